"""The picture of the checkpoint modes' memory is what its program draws now."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "docs" / "images" / "draw_memory.py"


def test_picture() -> None:
    """Numbers within five percent: kernels' scratch differs a little between processors."""
    program = runpy.run_path(str(PROGRAM))
    number = re.compile(r"\d+(?:\.\d+)?")
    kept, drawn = program["PICTURE"].read_text(encoding="utf-8"), program["picture"]()
    assert number.sub("#", kept) == number.sub("#", drawn)
    found, expected = (list(map(float, number.findall(text))) for text in (kept, drawn))
    assert found == pytest.approx(expected, rel=0.05, abs=1)
