"""What the tests of the benchmarks share: runs of the command line, records that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a suite and returns its record and its page."""

    def call(suite: str, *arguments: str, status: int = 0) -> tuple[dict[str, Any], str]:
        from benchmarks import cli

        quiet = ["--no-progress", "--device", "cpu", "--output", str(tmp_path)]
        assert cli.main([suite, *arguments, *quiet]) == status
        record = json.loads((tmp_path / f"{suite}.json").read_text())
        return record, (tmp_path / f"{suite}.md").read_text()

    return call


@pytest.fixture
def planned() -> Callable[..., dict[str, Any]]:
    """A record without figures of a suite, with what a page needs."""

    def plan(suite: str, **options: Any) -> dict[str, Any]:
        from benchmarks import cli
        from benchmarks.suites import Options, load

        record = cli.make_record(suite, load(suite), Options(**options), "the command")
        return {**record, "complete": True}

    return plan


@pytest.fixture
def page() -> Callable[[dict[str, Any]], str]:
    """The page of a record."""
    from benchmarks import cli
    from benchmarks.suites import load

    return lambda record: cli.page_of(record["suite"], load(record["suite"]), record)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DenseNet with ImageNet's stem, known as "small"."""
    from benchmarks.networks import NETWORKS

    spec = replace(NETWORKS["densenet121"], batch_size=2, image_size=64, num_classes=7)
    spec = replace(spec, block_config=(2, 1), name="Small")
    monkeypatch.setitem(NETWORKS, "small", spec)
    return spec


@pytest.fixture
def one_thread() -> Any:
    """One computes, whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
