"""Tables of declared columns, where densenet_fast is not first, pages and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up import CPU, cells

from benchmarks import plots, report
from benchmarks.environment import describe
from benchmarks.report import Column, Table, at, fastest, spread

TIME = Column("step, s", fastest("time"), report.plain, ratio="speed")
LARGEST = Column("largest", at("fits"), ratio="this / naive", larger=True)


def row(peer: str, *seconds: float, **more: Any) -> dict[str, Any]:
    return {"network": "N", "peer": peer, "time": {"seconds": list(seconds)}, **more}


def test_tables_line_up_and_compare_with_the_best_naive_layout() -> None:
    rows = [row("naive", 9.0, 8.0), row("naive-channels-last", 4.0), row("ours-none", 2.0, 3.0)]
    columns = (TIME, Column("spread", spread("time"), report.percent), Column("none", at("no")))
    assert Table("T", columns, rows, at("network")).markdown().splitlines() == [
        "| implementation                      | step, s | speed | spread |",
        "| ----------------------------------- | ------: | ----: | -----: |",
        "| N, naive, contiguous                |       8 | 0.50× |  5.9 % |",
        "| N, naive, channels_last             |       4 | 1.00× |      — |",
        '| N, densenet_fast, checkpoint="none" |       2 | 2.00× | 20.0 % |',
    ]


def test_cases_are_compared_among_themselves_and_empty_rows_left_out() -> None:
    rows = [row("naive", 4.0), row("ours-none", 2.0), row("ours-block")]
    rows += [{**r, "network": "M"} for r in (row("naive", 3.0), row("ours-none", 1.0))]
    text = Table("T", (TIME,), rows, at("network")).markdown()
    assert [line[2] for line in cells(text)[2:]] == ["1.00×", "2.00×", "1.00×", "3.00×"]
    assert Table("T", (TIME,), [row("naive")]).markdown() == ""


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (report.mebibytes, 1.5 * 2**20, "1.5"),
        (report.mebibytes, 1234.5 * 2**20, "1,234"),
        (report.plain, 0.0123456, "0.0123"),
        (report.milliseconds, 0.0123456, "12.3"),
        (report.percent, 0.9725, "97.2 %"),
    ],
)
def test_figures_have_three_digits(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


def ratios(table: Table) -> list[tuple[str, float]]:
    return [(where, ratio) for ratio, where in report.places([table])]


def test_each_of_ours_is_compared_with_the_best_of_all_others() -> None:
    rows = [row("naive", 9.0, 8.0), row("timm", 6.0, 7.0), row("ours-none", 6.5, 3.0)]
    assert ratios(Table("T", (TIME,), rows)) == [("step, s, T, ours-none", 2.0)]
    rows = [row("naive", fits=10), row("ours-none", fits=40), row("ours-block", fits=None)]
    assert ratios(Table("T", (LARGEST,), rows, at("network"))) == [
        ("largest, T, N, ours-none", 4.0)
    ]
    assert not ratios(Table("T", (TIME,), [row("ours-none", 1.0)]))
    rival = Column("ms", at("ours"), ratio="speed", rival=at("torch"))
    kernel = Table("T", (rival,), [{"ours": 2.0, "torch": 1.0}, {"ours": 2.0}])
    assert ratios(kernel) == [("ms, T", 0.5)]
    assert cells(kernel.markdown())[2] == ["", "2.0", "0.50×"]


def test_every_loss_is_listed_and_equal_is_none() -> None:
    first = Table("A", (TIME,), [row("naive", 2.0), row("ours-none", 4.0)])
    equal = Table("B", (TIME,), [row("naive", 2.0), row("ours-none", 2.0)])
    text = report.ranking([first, equal])
    assert "not first in 1 of 2 comparisons" in text
    assert text.splitlines()[-1] == "- step, s, A, ours-none: 0.500×"
    assert "first in all 1 comparisons" in report.ranking([equal])
    assert "Closest: step, s, B, ours-none: 1.000×." in report.ranking([equal])
    assert report.ranking([Table("C", (TIME,), [row("naive", 2.0)])]) == ""


@pytest.mark.parametrize("obstacle", [None, "no nvcc"])
def test_pages_name_the_kernels_of_the_device(obstacle: str | None) -> None:
    environment = describe(CPU)
    own = environment["densenet_fast"]
    assert not any(key.rpartition("cuda_")[2] == "extension" for key in own)  # paths
    own.update(cuda_reason=obstacle, cuda_architectures=["8.0", "9.0"], cuda_nvcc="CUDA 13.0")
    text = report.environment_text({**environment, "device": "cuda", "device_name": "A GPU"})
    expected = "CUDA kernels for 8.0, 9.0, built by CUDA 13.0"
    assert ("reference implementation ran** (no nvcc)" if obstacle else expected) in text
    assert "device name: A GPU" in text


def test_a_page_has_settings_findings_and_what_went_wrong() -> None:
    record = {
        "command": "the command",
        "complete": False,
        "environment": describe(CPU),
        "settings": {"batch_size": 4, "peers": ["a", "b"], "networks": [{"name": "N"}]},
    }
    table = Table("Tables", (TIME,), [row("naive", 1.0)])
    text = report.page("step", "A page", record, [table], ["It works."], ["memory of N: no"])
    assert text.startswith("# A page\n\nCommand: `the command`\n\n**Interrupted")
    for part in ("batch size: 4; peers: a, b\n", "## Tables", "It works.", "- memory of N: no"):
        assert part in text
    assert "not first" not in text


def test_bars_are_ratios_and_curves_are_losses(tmp_path: Path) -> None:
    rows = [row("naive", 4.0), row("ours-none", 2.0), row("ours-block")]
    (panel,) = plots._bars([Table("T", (TIME, LARGEST), rows)])
    assert panel == ("step, s: speed", {"T": {"naive": 1.0, "ours-none": 2.0}})
    rows[1]["time"]["losses"] = [3.0, 2.0]
    files = plots.write(tmp_path / "x.md", [Table("T", (TIME,), rows)], rows)
    assert [file.name for file in files if file.stat().st_size] == ["x.png", "x.svg"]
    assert not plots.write(tmp_path / "x.md", [], [])
    assert plots.running_means([1, 3, 5, 7], 2) == [1, 2, 4, 6]
