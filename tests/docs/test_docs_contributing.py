"""CONTRIBUTING's table says where each operator is, of all operators."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def code(row: str) -> list[list[str]]:
    """Inline code of a table's row, cell by cell."""
    return [re.findall(r"`(.*?)`", cell) for cell in row.split("|")[1:-1]]


def test_the_table_of_operators() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    header, _, *rows = page[page.index("| operator |") :].partition("\n\n")[0].splitlines()
    named: list[str] = []
    for row in rows:
        operators, *places = code(row)
        named += operators
        for (folder,), files in zip(code(header)[1:], places, strict=True):
            paths = [ROOT / file if "/" in file else ROOT / folder / file for file in files]
            assert all(path.is_file() for path in paths), row
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    assert sorted(named) == sorted(defined)
