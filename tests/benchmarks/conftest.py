"""Runs of the benchmarks' command line, and a small network for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of arguments that are refused."""

    def call(*arguments: str, output: Path = tmp_path) -> str:
        from benchmarks import cli

        with pytest.raises(SystemExit, match="2"):
            cli.main([*arguments, "--output", str(output)])
        return capsys.readouterr().err

    return call


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DenseNet with ImageNet's stem, known as "small"."""
    from benchmarks.networks import NETWORKS

    spec = replace(NETWORKS["densenet121"], batch_size=2, image_size=64, num_classes=7)
    spec = replace(spec, block_config=(2, 1), name="Small")
    monkeypatch.setitem(NETWORKS, "small", spec)
    return spec


@pytest.fixture
def tiny_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few layers and few small images for the suites of one number that varies."""
    monkeypatch.setattr("benchmarks.suites.sweep.IMAGE_SIZES", {1: 64, 2: 8})
    monkeypatch.setattr("benchmarks.suites.growth.DEPTH", 10)
    monkeypatch.setattr("benchmarks.suites.growth.BATCH_SIZE", 2)
    monkeypatch.setattr("benchmarks.suites.depth.GROWTH_RATE", 4)
    monkeypatch.setattr("benchmarks.suites.depth.BATCH_SIZE", 3)
