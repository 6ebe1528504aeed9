"""All suites one after another, and one page of all their pages: `python -m benchmarks all`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import ranking
from benchmarks.suites import load
from densenet_fast.train.storage import write_atomically

ALL = "all"
# The gate repeats in small what others measure, `growth` and `depth` contain `step`'s figures, and
# `latency` is of small work alone.
SUITES_OF_ALL = (
    *("training", "growth", "depth", "networks", "capacity"),
    *("quality", "finetune", "kernels"),
)


def write_report(output: Path, names: Sequence[str]) -> Path:
    """One page of the suites' pages in `output`, with a table of contents and the losses."""
    records = [json.loads((output / f"{n}.json").read_text(encoding="utf-8")) for n in names]
    minutes = [f"{n} {record['minutes']:.0f}" for n, record in zip(names, records, strict=True)]
    contents = "\n".join(f"- [{load(name).title}](#{name})" for name in names)
    tables = [
        table
        for name, record in zip(names, records, strict=True)
        for table in load(name).tables(record)
    ]
    blocks = ["# Measurements", contents, f"Minutes: {', '.join(minutes)}."]
    blocks.append("## Where densenet_fast is not first")
    blocks.append(ranking(tables) or "Nothing was measured beside another implementation.")
    for name in names:
        page = (output / f"{name}.md").read_text(encoding="utf-8").splitlines()
        lowered = [f"#{line}" if line.startswith("#") else line for line in page]
        blocks.append("\n".join([f'<a id="{name}"></a>\n', *lowered, ""]))
    path = output / "report.md"
    write_atomically(path, "\n\n".join(blocks).encode())
    return path
