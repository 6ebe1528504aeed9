"""Records and figures that are made up, and what their pages show."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from benchmarks import cli
from benchmarks.suites import Options, load

CPU = torch.device("cpu")
MIB = 2**20
PROC = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")


def planned(suite: str, **options: Any) -> dict[str, Any]:
    """A record without figures of a suite, with what a page needs."""
    record = cli.make_record(suite, load(suite), Options(**options), "the command")
    return {**record, "complete": True}


def page(record: dict[str, Any]) -> str:
    return cli.page_of(record["suite"], load(record["suite"]), record)


def figures(peak: int, **more: Any) -> dict[str, Any]:
    """Memory of a step."""
    keys = ("peak_gradients_allocated", "peak_gradients_freed")
    keys += ("saved_for_backward", "resident_after_forward", "parameters")
    return {**dict.fromkeys(keys, peak), **more}


def cells(text: str, label: str = "") -> list[list[str]]:
    """Those of the tables' rows with this in them."""
    rows = [line for line in text.splitlines() if line.startswith("|") and label in line]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
