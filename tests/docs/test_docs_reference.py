"""The reference names everything public, with the signatures that it has."""

from __future__ import annotations

import ast
import inspect
import re
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


def documented() -> list[tuple[str, str]]:
    """Names and signatures in the first cells of tables."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w.]+)(\(.*?\))` \|", text, re.MULTILINE)


def test_everything_public_is_named_and_nothing_else() -> None:
    assert sorted(name for name, _ in documented()) == sorted(public())


@pytest.mark.parametrize(("name", "signature"), documented())
def test_signatures(name: str, signature: str) -> None:
    """Of parameters without their types; however a default is written."""
    actual = inspect.signature(public()[name])
    bare = [one.replace(annotation=one.empty) for one in actual.parameters.values()]
    actual = actual.replace(parameters=bare, return_annotation=actual.empty)
    found, expected = (ast.dump(ast.parse(f"def f{text}: pass")) for text in (signature, actual))
    assert found == expected
