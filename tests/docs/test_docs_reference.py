"""The reference names everything public, with the signatures that it has."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import densenet_fast
from densenet_fast import memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def public() -> dict[str, Any]:
    """What may be called, by its name in the reference."""
    found = {name: getattr(densenet_fast, name) for name in densenet_fast.__all__}
    found.update({f"memory.{name}": getattr(memory, name) for name in memory.__all__})
    return {name: value for name, value in found.items() if callable(value)}


def documented(text: str) -> dict[str, str]:
    """Signatures in the first cells of tables, by name."""
    cells = re.findall(r"^\| `([\w.]+)(\(.*?\))` \|", text, re.MULTILINE)
    assert len({name for name, _ in cells}) == len(cells)
    return dict(cells)


def shape(parameters: list[inspect.Parameter]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in parameters]


def written(signature: str) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of a signature as text, whose defaults are literals."""
    scope: dict[str, Callable[..., None]] = {}
    tree = ast.parse(f"def function{signature}: pass")
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    for default in (*function.args.defaults, *filter(None, function.args.kw_defaults)):
        ast.literal_eval(default)
    exec(compile(tree, PAGE.name, "exec"), scope)
    return shape(list(inspect.signature(scope["function"]).parameters.values()))


def test_everything_public_is_named_and_nothing_else() -> None:
    assert set(documented(PAGE.read_text(encoding="utf-8"))) == set(public())


@pytest.mark.parametrize("name", sorted(public()))
def test_signatures(name: str) -> None:
    signature = documented(PAGE.read_text(encoding="utf-8"))[name]
    assert written(signature) == shape(list(inspect.signature(public()[name]).parameters.values()))


@pytest.mark.parametrize(
    "signature", ["(model)", "(model, checkpoint='bottleneck')", "(model, *, checkpoint='none')"]
)
def test_other_signatures_are_noticed(signature: str) -> None:
    actual = shape(list(inspect.signature(densenet_fast.convert).parameters.values()))
    assert written(signature) != actual
