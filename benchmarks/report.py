"""Result pages: Markdown tables, raw JSON, and plots in PNG and SVG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_fast.train.storage import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "—"


def mebibytes(size: float | None) -> str:
    """A number of bytes in MiB, with the digits that matter."""
    if size is None:
        return MISSING
    value = size / 2**20
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def seconds(value: float | None) -> str:
    """A time in seconds with three significant digits."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    """A time in milliseconds with three significant digits."""
    if value is None:
        return MISSING
    value *= 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(numerator: float | None, denominator: float | None) -> str:
    """`numerator / denominator` as a factor."""
    if not numerator or not denominator:
        return MISSING
    return f"{numerator / denominator:.2f}×"


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def loss_text(value: float | None) -> str:
    """A loss with four decimals."""
    return MISSING if value is None else f"{value:.4f}"


@dataclass
class Table:
    """A table: the first column holds names, the others figures."""

    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in Markdown, padded so that it also reads well as plain text."""
        lines = [list(self.columns), *(list(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        rule = ["-" * max(width, 3) for width in widths]
        rule[1:] = [bar[:-1] + ":" for bar in rule[1:]]

        def render(cells: Sequence[str]) -> str:
            padded = [cells[0].ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            return "| " + " | ".join(padded) + " |"

        head, *body = lines
        ruler = "| " + " | ".join(rule) + " |"
        return "\n".join([render(head), ruler, *map(render, body)])


@dataclass
class Page:
    """A page of results: a title and blocks of text and tables."""

    title: str
    blocks: list[str | Table] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Start a section."""
        self.blocks.append(f"## {text}")

    def add(self, *blocks: str | Table) -> None:
        """Append paragraphs and tables."""
        self.blocks.extend(blocks)

    def not_measured(self, cases: Iterable[str]) -> None:
        """List cases without figures and why, if there are any."""
        lines = [f"- {case}" for case in cases]
        if lines:
            self.add("Not measured:", "\n".join(lines))

    def markdown(self) -> str:
        """The whole page."""
        texts = [block.markdown() if isinstance(block, Table) else block for block in self.blocks]
        return "\n\n".join([f"# {self.title}", *texts]) + "\n"


def environment_text(environment: dict[str, Any]) -> str:
    """One paragraph about the machine and the versions of a result."""
    memory = environment["memory_bytes"]
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["versions"].items() if version
    )
    own = environment["densenet_fast"]
    if environment["device"].startswith("cuda"):
        if own["cuda"]:
            compiled = ", ".join(own["cuda_architectures"])
            kernels = f"CUDA kernels for {compiled}, built by {own['cuda_nvcc']}"
        else:
            kernels = (
                f"**no CUDA kernels** ({own['cuda_reason']}): its reference implementation ran"
            )
    elif own["cpu_isa"]:
        kernels = f"CPU kernels for {own['cpu_isa']}, built by {own['compiler']}"
    else:
        kernels = "**no compiled module**: its reference implementation was measured"
    parts = [
        f"Machine: {environment['machine']}, {environment['cpu']}, "
        f"{environment['logical_cores']} logical cores"
        + (f", {memory / 2**30:.0f} GiB" if memory else "")
        + f", {environment['system']}.",
        f"Device: {environment['device_name'] or environment['device']}; "
        f"{environment['threads']} threads; PyTorch's CPU capability "
        f"{environment['torch_cpu_capability']}.",
        f"Versions: Python {environment['python']}, {versions}.",
        f"densenet_fast {own['version']}: {kernels}.",
        f"Commit: {environment['commit'] or 'unknown'}. Date: {environment['date']}.",
    ]
    load = environment.get("load_average_at_start")
    if load is not None:
        parts.append(f"Load average when the run started: {load:.2f}.")
    return "\n".join(parts)


def intro(record: dict[str, Any]) -> list[str]:
    """Opening paragraphs of every page: command, completeness, machine."""
    state = ""
    if not record["complete"]:
        reason = f"Stopped by {record['error']}" if "error" in record else "Interrupted"
        state = f"\n\n**{reason}: the results below are partial.**"
    return [f"Command: `{record['command']}`{state}", environment_text(record["environment"])]


def write_json(output: Path, name: str, record: dict[str, Any]) -> Path:
    """Write the raw figures."""
    path = output / f"{name}.json"
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())
    return path


def write_page(output: Path, name: str, page: Page, figure: Figure | None) -> list[Path]:
    """Write a page and its plot; returns the files."""
    written = []
    if figure is not None:
        for suffix in ("png", "svg"):
            path = output / f"{name}.{suffix}"
            figure.savefig(path, dpi=130)
            written.append(path)
        page.add(f"![{page.title}]({name}.png)")
    path = output / f"{name}.md"
    write_atomically(path, page.markdown().encode())
    return [path, *written]
