"""The documentation's code runs, its commands are such that programs take them, its links lead
somewhere. Anchors and links within `docs/` are checked by `mkdocs build --strict`."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import dropwhile, groupby, takewhile
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sybil")

from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch.distributed.run import get_args_parser as make_torchrun_parser

from benchmarks import cli
from densenet_fast.train import rules, setup
from densenet_fast.train.arguments import make_parser
from densenet_fast.train.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
OURS = re.compile(r"(\.ci|benchmarks|csrc|densenet_fast|docs|examples|tests)/[\w.*/+-]+")
RUN = """
import sys, unittest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
page = Document.parse(sys.argv[1], PythonCodeBlockParser(), SkipParser())
page.namespace["__name__"] = "__main__"
for example in page.examples():
    try:
        example.evaluate()
    except unittest.SkipTest:  # the page says why
        pass
"""


def run(folder: Path, *arguments: str) -> None:
    """Run Python in another folder, with this one's sources, as torchrun would for one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any that is free
    environment = {**os.environ, **address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@EVERY_PAGE
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    """In order, as one program of one process; those that are not run are Python all the same."""
    blocks = list(Document.parse(str(path), PythonCodeBlockParser()).examples())
    for block in blocks:
        compile(block.parsed, f"{path.name}, line {block.line}", "exec")
    if blocks:
        run(tmp_path, "-c", RUN, str(path))


def test_a_page_with_a_mistake_fails_at_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    skipped = '<!-- skip: next "needs a GPU" -->\n```python\nraise SystemExit(3)\n```\n'
    page.write_text(f"{skipped}\n```python\nx = 1\n```\n\n```python\nassert x == 2, x\n```\n")
    with pytest.raises(AssertionError, match=r'page.md", line 11[^$]*AssertionError: 1'):
        run(tmp_path, "-c", RUN, str(page))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command", "short"),
    [
        ("README.md", "python -m benchmarks", "--parts parity --growth-rates 12 --rounds 1"),
        ("docs/training.md", "densenet-fast train", "--epochs 1 --depth 10 --growth-rate 4"),
    ],
)
def test_first_commands_run(page: str, command: str, short: str, tmp_path: Path) -> None:
    """What a page begins with, run for real, with flags that make it short."""
    assert command in [shlex.join(argv) for _, argv in commands(ROOT / page)]
    program = command.removeprefix("python ").replace("densenet-fast", "-m densenet_fast")
    run(tmp_path, *program.split(), *short.split())


# ---- Commands, which are parsed by the programs they call


def split(line: str) -> Iterator[list[str]]:
    """Commands of a line of a shell, without comments, assignments and redirections."""
    code = re.sub(r"(^|\s)#.*|\s\d?>&\d", "", line)
    lexer = shlex.shlex(code, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    for between, words in groupby(lexer, re.compile(r"[();|&]+$").match):
        assigned = dropwhile(re.compile(r"[A-Za-z_]\w*=").match, words)
        command = list(takewhile(lambda word: not re.fullmatch(r"[<>]+", word), assigned))
        if command and not between:
            yield command


def commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Where a command stands, and its words: in blocks, and in backticks with parts left out."""
    text = path.read_text(encoding="utf-8")
    for block in Document.parse(str(path), CodeBlockParser("bash")).examples():
        for line in str(block.parsed).replace("\\\n", " ").splitlines():
            yield from ((f"block in line {block.line}", argv) for argv in split(line))
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"(?ms)^```.*?^```", "", text)):
        words = " ".join(code.split())
        if re.match(r"(densenet-fast|python|pip install) \S|--[a-z]", words):
            yield from (("inline", argv) for argv in split(words))
        elif OURS.match(words):
            yield "inline", ["ls", words]


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace | None:
    """The arguments, or None where the program would print its help."""
    parser.allow_abbrev, said = False, io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise ValueError(said.getvalue().strip().splitlines()[-1]) from end
        return None


def known_flags() -> set[str]:
    """All flags that a text may name."""
    parsers = [cli.make_parser(), make_torchrun_parser(), make_parser()]
    (parts,) = (a for a in parsers[-1]._actions if isinstance(a, argparse._SubParsersAction))
    parsers += parts.choices.values()
    of_first_run = "--only"
    return {of_first_run, *(flag for parser in parsers for flag in parser._option_string_actions)}


def check(argv: Sequence[str], folder: Path, *, inline: bool) -> None:
    """Raises `ValueError` if a command would not do what the page says."""
    for word in argv:
        name = word.partition("::")[0].rstrip("/")
        if OURS.fullmatch(name) and not name.endswith(".so") and not any(ROOT.glob(name)):
            raise ValueError(f"there is no file {name!r}")
    text = shlex.join(argv)
    if argv[0].startswith("--"):
        if argv[0].partition("=")[0] not in known_flags():
            raise ValueError("no program has this flag")
    elif argv[0] == "torchrun":
        given = parsed(make_torchrun_parser(), argv[1:])
        if given is not None:
            script = [given.training_script, *given.training_script_args]
            check(["python", *["-m"] * given.module, *script], folder, inline=inline)
    elif match := re.match(r"(densenet-fast|python -m densenet_fast(\.train)?)( |$)", text):
        arguments = ["train"] * bool(match[2]) + list(argv[1 if argv[0] != "python" else 3 :])
        arguments += ["--help"] * (len(arguments) < 2 and inline)
        given = parsed(make_parser(), arguments) if arguments else None
        if given is not None and not inline and given.command == "train":
            given.model = given.model or setup.default_model(given)
            rules.complete(given)
        elif given is not None and not inline:
            rules.one_of_checkpoint_and_weights(given)
    elif text.startswith("python -m benchmarks"):
        given = parsed(cli.make_parser(), argv[3:])
        if given is not None and given.suite == cli.ALL:
            if any(getattr(given, name) is not None for name in cli.SUITE_FLAGS):
                raise ValueError(f"flags of one suite do not go with {cli.ALL!r}")
        elif given is not None:
            given.device, given.output = "cpu", folder
            cli.make_options(given)
    elif argv[0] == "pip":
        known = (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2]
        for extra in re.findall(r"[\w-]+", ",".join(re.findall(r"\[(.*)\]", text))):
            if not re.search(rf"(?m)^{extra} = \[", known):
                raise ValueError(f"unknown extra {extra!r}")


def problems(path: Path, folder: Path) -> Iterator[str]:
    """The wrong commands of a page."""
    for where, argv in commands(path):
        try:
            check(argv, folder, inline=where == "inline")
        except (ValueError, UsageError) as error:
            if "not installed here" not in str(error):
                yield f"{where}: {shlex.join(argv)}: {error}"


@EVERY_PAGE
def test_commands(path: Path, tmp_path: Path) -> None:
    assert not list(problems(path, tmp_path))


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("densenet-fast train --epoch 3", "unrecognized arguments: --epoch"),
        ("densenet-fast train --model densenet121 --depth 40", "--depth 40 applies to"),
        ("cat a | densenet-fast predict --checkpoint b.pt", "IMAGE|FOLDER|-"),
        ("X=1 python -m densenet_fast.train --lr -1 > log", "--lr"),
        ("torchrun --nproc-per-node 2 -m densenet_fast.train --bogus", "--bogus"),
        ("python -m benchmarks step \\\n  --growth 12", "--growth 12"),
        ("python -m benchmarks growth --budgets 512", "--budgets does not apply"),
        ("python -m benchmarks all --rounds 3", "flags of one suite"),
        ('pip install ".[bench,tset]"', "unknown extra 'tset'"),
        ("ruff check tests/missing_*.py", "there is no file 'tests/missing_*.py'"),
    ],
)
def test_wrong_commands_are_found(command: str, problem: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n```bash\ndensenet-fast train  # right\n{command}\n```\n")
    (found,) = problems(page, tmp_path)
    assert problem in found
    page.write_text("`python -m benchmarks\nstp` `docs/nothing.md` `--epoch 3` `--epochs 3`\n")
    assert len(list(problems(page, tmp_path))) == 3


# ---- What else a page may get wrong


@EVERY_PAGE
def test_no_block_is_unchecked_and_links_outside_docs_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^ *```(\S*)$", text)) <= {"", "python", "bash", "text"}
    for target in re.findall(r"(?:\]\(|src=\")(?![a-z]+:)([^)\s\"]+)", text):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), name
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{name}#{anchor}"
