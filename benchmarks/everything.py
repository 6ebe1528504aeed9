"""All suites one after another, and one page of all their pages: `python -m benchmarks all`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks import ranking
from densenet_fast.train.storage import write_atomically

ALL = "all"
# The gate repeats in small what others measure, `growth` and `depth` contain `step`'s figures, and
# `latency` is of small work alone.
SUITES_OF_ALL = (
    "training",
    "growth",
    "depth",
    "networks",
    "capacity",
    "quality",
    "finetune",
    "kernels",
    "predict",
)


def write_report(output: Path, names: Iterable[str]) -> Path:
    """One page of the suites' pages in `output`, with a table of contents and the losses."""
    names = list(names)
    pages = {name: (output / f"{name}.md").read_text(encoding="utf-8") for name in names}
    titles = {name: text.splitlines()[0].removeprefix("# ") for name, text in pages.items()}
    contents = "\n".join(f"- [{title}](#{name})" for name, title in titles.items())
    records = [json.loads((output / f"{n}.json").read_text(encoding="utf-8")) for n in names]
    minutes = [f"{n} {record['minutes']:.0f}" for n, record in zip(names, records, strict=True)]
    head = (
        f"Minutes: {', '.join(minutes)}.",
        "## Where densenet_fast is not first",
        ranking.summary(records),
    )
    sections = [f'<a id="{name}"></a>\n\n{_lowered(text)}' for name, text in pages.items()]
    path = output / "report.md"
    write_atomically(path, "\n\n".join(["# Measurements", contents, *head, *sections]).encode())
    return path


def _lowered(page: str) -> str:
    """The page with its headings one level down."""
    lines = page.splitlines()
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in lines) + "\n"
