"""What pages say of the code: where operators are, what is public, how much memory modes take."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest

import densenet_fast
from densenet_fast import memory

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_operators() -> None:
    """It says where each operator is, of all operators."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    table = page[page.index("| operator |") :].partition("\n\n")[0].splitlines()
    cells = [[re.findall(r"`(.*?)`", cell) for cell in row.split("|")[1:-1]] for row in table]
    (_, *folders), _, *rows = cells
    for _, *places in rows:
        for (folder,), files in zip(folders, places, strict=True):
            paths = [ROOT / file if "/" in file else ROOT / folder / file for file in files]
            assert all(path.is_file() for path in paths), paths
    defined = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "ops.cpp").read_text())
    assert sorted(name for named, *_ in rows for name in named) == sorted(defined)


def spelled(signature: object) -> str:
    """One way to write it."""
    return ast.unparse(ast.parse(f"def f{signature}: pass"))


def test_the_reference_has_everything_public_and_nothing_else() -> None:
    """With its parameters, which have no types there."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([\w.]+)(\(.*?\))` \|", text)
    found, expected = [(name, spelled(signature)) for name, signature in rows], []
    for start, module in (("", densenet_fast), ("memory.", memory)):
        for name in filter(lambda name: callable(getattr(module, name)), module.__all__):
            actual = inspect.signature(getattr(module, name))
            bare = [one.replace(annotation=one.empty) for one in actual.parameters.values()]
            actual = actual.replace(parameters=bare, return_annotation=actual.empty)
            expected.append((start + name, spelled(actual)))
    assert sorted(found) == sorted(expected)


def test_the_picture_of_memory_is_what_its_program_draws() -> None:
    """Numbers within five percent: kernels' scratch differs a little between processors."""
    program = runpy.run_path(str(ROOT / "docs" / "images" / "draw_memory.py"))
    number = re.compile(r"\d+(?:\.\d+)?")
    kept, drawn = program["PICTURE"].read_text(encoding="utf-8"), program["picture"]()
    assert number.sub("#", kept) == number.sub("#", drawn)
    found, expected = (list(map(float, number.findall(text))) for text in (kept, drawn))
    assert found == pytest.approx(expected, rel=0.05, abs=1)
