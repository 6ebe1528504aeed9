"""The pages of the documentation: their code blocks, inline code, links and anchors."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import socket
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
# In the line directly before a block; the reason is for readers.
NOT_RUN = re.compile(r"<!-- not run: *(?P<reason>.*?) *-->")
SHELLS = ("bash", "sh", "shell")
# What blocks may import besides the package and its requirement; a page is skipped without it.
OPTIONAL = ("lightning", "monai", "onnx", "onnxruntime", "torchmetrics", "torchvision", "timm")
OPTIONAL += ("torchxrayvision", "segmentation_models_pytorch", "numpy", "sklearn", "safetensors")
_MARKDOWN = MarkdownIt("commonmark").enable("table")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
_HTML_LINK = re.compile(r"""<[^>]*\b(?:src|href)=["']([^"']+)["']""")
_RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': '__main__'})"


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text and the line of the page that the text begins in."""

    language: str
    text: str
    line: int
    reason: str | None  # why it is not run, or None if it is


@dataclass(frozen=True)
class Inline:
    """Inline code, or the target of a link, and the line in which its paragraph begins."""

    text: str
    line: int


def pages() -> list[Path]:
    """All pages, the repository's and the documentation's."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Page:
    """A parsed page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self._tokens = _MARKDOWN.parse(self.text)

    def blocks(self) -> list[Block]:
        """Its code blocks; indented ones have no language."""
        found = []
        for token in self._tokens:
            if token.type not in ("fence", "code_block"):
                continue
            assert token.map is not None
            first = token.map[0]
            marker = NOT_RUN.fullmatch(self.lines[first - 1].strip()) if first else None
            words = token.info.split() if token.type == "fence" else []
            found.append(
                Block(
                    language=words[0].lower() if words else "",
                    text=token.content,
                    line=first + 1 + (token.type == "fence"),
                    reason=marker["reason"] if marker else None,
                )
            )
        return found

    def block_problems(self) -> list[str]:
        """Blocks that nothing here runs or checks, and markers without a reason or a block."""
        problems, marked = [], 0
        for block in self.blocks():
            marked += block.reason is not None
            if block.reason == "":
                problems.append(f"line {block.line}: `not run` needs a reason")
            if block.language not in ("python", "text", *SHELLS) and block.reason is None:
                problems.append(
                    f"line {block.line}: nothing checks a block of language {block.language!r}: "
                    "write <!-- not run: REASON --> in the line before it"
                )
        if marked != sum(line.strip().startswith("<!-- not run") for line in self.lines):
            problems.append("a `not run` marker is not directly before a block, or ill-formed")
        return problems

    def _inline(self) -> list[tuple[Token, int]]:
        found = []
        for token in self._tokens:
            line = token.map[0] + 1 if token.map else 1
            if token.type == "html_block":
                found.append((token, line))
            found += [(child, line) for child in token.children or ()]
        return found

    def inline_code(self) -> list[Inline]:
        """What stands in backticks in its text, line breaks as spaces."""
        tokens = self._inline()
        return [
            Inline(token.content, line) for token, line in tokens if token.type == "code_inline"
        ]

    def links(self) -> list[Inline]:
        """Targets of its links and images that are neither elsewhere in the web nor e-mail."""
        found = []
        for token, line in self._inline():
            if token.type in ("link_open", "image"):
                found.append((str(token.attrs.get("href") or token.attrs.get("src") or ""), line))
            elif token.type in ("html_block", "html_inline"):
                found += [(target, line) for target in _HTML_LINK.findall(token.content)]
        return [Inline(target, line) for target, line in found if not _EXTERNAL.match(target)]

    def anchors(self) -> set[str]:
        """Anchors of its headings that GitHub and mkdocs both make, and those written as HTML."""
        written = set(re.findall(r'^<a id="([\w-]+)"></a>$', "\n".join(self.lines), re.MULTILINE))
        texts = []
        for heading, content in zip(self._tokens, self._tokens[1:], strict=False):
            if heading.type == "heading_open":
                parts = content.children or ()
                texts.append("".join(p.content for p in parts if p.type in ("text", "code_inline")))
        made = _numbered(map(_github, texts), "-") & _numbered(map(_mkdocs, texts), "_")
        return made | written

    def link_problems(self, root: Path = ROOT) -> list[str]:
        """Links whose file or anchor is not there."""
        problems = []
        for link in self.links():
            name, _, anchor = unquote(link.text).partition("#")
            file = (self.path.parent / name).resolve() if name else self.path
            if not (file.exists() and file.is_relative_to(root.resolve())):
                problems.append(f"line {link.line}: there is no file {link.text!r}")
            elif anchor and file.suffix == ".md":
                there = Page(file).anchors()
                if anchor not in there:
                    problems.append(
                        f"line {link.line}: {file.name} has no anchor {anchor!r}; there are "
                        f"{', '.join(sorted(there))}"
                    )
        return problems

    def missing_modules(self) -> list[str]:
        """Optional libraries that its blocks import and that are not installed."""
        names = set()
        for block in self.blocks():
            if block.language == "python" and block.reason is None:
                for node in ast.walk(_parsed(block)):
                    if isinstance(node, ast.Import):
                        names |= {alias.name.partition(".")[0] for alias in node.names}
                    elif isinstance(node, ast.ImportFrom) and node.module:
                        names.add(node.module.partition(".")[0])
        return [n for n in sorted(names & {*OPTIONAL}) if importlib.util.find_spec(n) is None]

    def run(self, folder: Path) -> str:
        """Run its Python blocks in order, as one program of one process; "" or what failed.

        All other lines of the page are empty lines of the program, so that tracebacks show the
        page, the line in it, and its text. Blocks that are not run must be Python all the same.
        """
        lines = [""] * len(self.lines)
        for block in self.blocks():
            if block.language != "python":
                continue
            try:
                _parsed(block)
            except SyntaxError as error:
                return f"{self.path}, line {error.lineno}: {error.msg}"
            if block.reason is None:
                text = block.text.splitlines()
                lines[block.line - 1 : block.line - 1 + len(text)] = text
        if not any(lines):
            return ""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            # As torchrun sets them, for one process.
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        result = subprocess.run(
            [sys.executable, "-c", _RUN, str(self.path)],
            input="\n".join(lines),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if result.returncode == 0:
            return ""
        return f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"


def _parsed(block: Block) -> ast.Module:
    return ast.parse("\n" * (block.line - 1) + block.text)


def _github(text: str) -> str:
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _mkdocs(text: str) -> str:
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def _numbered(slugs: map[str], separator: str) -> set[str]:
    """The same heading again gets a number."""
    count: dict[str, int] = {}
    found = set()
    for slug in slugs:
        count[slug] = count.get(slug, -1) + 1
        found.add(f"{slug}{separator}{count[slug]}" if count[slug] else slug)
    return found
