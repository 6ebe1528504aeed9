"""The list of places where densenet_fast is not first, and the page of all suites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")

from benchmarks import cli, everything, ranking
from benchmarks.suites import Options, networks


def record(ours: float, other: float) -> dict[str, Any]:
    times = (("naive", [9.0, 8.0]), ("timm", [other, 7.0]), ("ours-none", [6.5, ours]))
    return {
        "memory": [
            {"network": "N", "peer": "naive", "peak_gradients_allocated": 100},
            {"network": "N", "peer": "ours-none", "peak_gradients_allocated": 50},
        ],
        "time": [{"network": "N", "peer": peer, "seconds": seconds} for peer, seconds in times],
        "inference": [{"network": "N", "peer": "ours-none", "seconds": [1.0]}],
    }


def test_each_figure_is_compared_with_the_best_of_the_others() -> None:
    found = ranking.places(record(ours=3.0, other=6.0))
    assert [(place.ratio, place.other) for place in found] == [
        (2.0, "naive, contiguous"),
        (2.0, "timm, channels_last"),
    ]
    assert "first in all 2 comparisons" in ranking.summary([record(3.0, 6.0)])


def test_every_loss_is_listed_and_equal_is_none() -> None:
    kernel = {"kernel": "pool", "label": "small", "threads": 1}
    slow = {"kernels": [{**kernel, "seconds": {"ours": [2.0, 4.0], "torch": [1.0]}}]}
    text = ranking.summary([record(4.0, 2.0), record(2.0, 2.0), slow])
    assert "**In 2 of 5 comparisons" in text
    assert "- training step, N: densenet_fast" in text and "0.500×" in text
    assert "- kernel pool, small, 1 threads: the kernel is behind" in text


def test_training_and_what_fits_are_compared_too() -> None:
    trained = {
        "suite": "training",
        "memory": [{"growth_rate": 12, "peer": "naive", "saved_for_backward": 9}],
        "training": [
            {"growth_rate": 12, "peer": peer, "seconds": [seconds]}
            for peer, seconds in (("naive", 2.0), ("ours-block", 4.0))
        ],
    }
    fitting = {
        "batch": [
            {"title": "T", "budget": 512, "peer": peer, "fits": fits}
            for peer, fits in (
                ("naive", {"value": 10}),
                ("ours-none", {"value": 40}),
                ("memory-efficient", None),
            )
        ]
    }
    (slower,) = ranking.places(trained)
    assert (slower.where, slower.ratio) == ("training step, suite training k=12", 0.5)
    (larger,) = ranking.places(fitting)
    assert (larger.where, larger.ratio) == ("T, 512 MiB", 4.0)


def test_without_other_implementations_nothing_is_claimed() -> None:
    assert "Nothing was measured" in ranking.summary([{"inference": record(1, 1)["inference"]}])


def test_a_compiler_takes_main_networks_unless_named() -> None:
    whole = networks.plan(Options(full=True))["settings"]
    assert len(whole["networks"]) == 12
    assert whole["compiled_networks"] == ["DenseNet-121", "DenseNet-BC-100"]
    named = networks.plan(Options(networks=("densenet201",), peers=("naive", "compiled-naive")))
    assert named["settings"]["compiled_networks"] == ["DenseNet-201"]


def test_report_has_minutes_losses_and_pages(tmp_path: Path) -> None:
    for name, figures in (("networks", record(4.0, 2.0)), ("predict", {})):
        (tmp_path / f"{name}.md").write_text(f"# About {name}\n\n## Part\n")
        (tmp_path / f"{name}.json").write_text(json.dumps({**figures, "minutes": 2.6}))
    text = everything.write_report(tmp_path, ("networks", "predict")).read_text()
    assert "Minutes: networks 3, predict 3." in text
    assert text.index("Where densenet_fast is not first") < text.index("## About networks")
    assert "In 1 of 2 comparisons" in text and "### Part" in text


def test_minutes_of_a_resumed_run_add_up(tmp_path: Path) -> None:
    command = ["predict", "--networks", "densenet121", "--output", str(tmp_path), "--no-progress"]
    assert cli.main(command) == 0
    path = tmp_path / "predict.json"
    first = json.loads(path.read_text())
    path.write_text(json.dumps({**first, "minutes": 100.0}))
    assert cli.main([*command, "--resume"]) == 0
    assert json.loads(path.read_text())["minutes"] > 100
