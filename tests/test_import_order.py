"""Imports in the package go down only, from room to room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "densenet_fast"
# From below. Rooms of one floor do not import each other; `__init__` is what the package exports.
FLOORS = (
    ("_version", "arguments", "operators", "reports"),
    ("blocks",),
    ("weights",),
    ("modules",),
    ("conversion",),
    ("fusion", "inference"),
    ("memory", "build_info"),
    ("__init__",),
    ("train",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def wrong_imports(room: str, source: str) -> list[str]:
    """What a file of `room` imports from its own floor or above, or for type checkers alone."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            wrong += [line for line in ast.unparse(node).splitlines() if "densenet_fast" in line]
        for name in names:
            package, *rest = name.split(".")
            other = rest[0] if rest and rest[0] in FLOOR else "__init__"
            if package == "densenet_fast" and other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert wrong_imports(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("operators", "from densenet_fast import arguments"),
        ("blocks", "def run():\n    import densenet_fast.modules.steps"),
        ("modules", "from densenet_fast import blocks, convert"),
        ("modules", "if TYPE_CHECKING:\n    from densenet_fast.modules.layers import Transition"),
    ],
)
def test_imports_that_do_not_are_found(room: str, source: str) -> None:
    assert len(wrong_imports(room, source)) == 1
