"""The sweep covers the growth rates and depths it names, and says where ours is slower."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure, memory
from benchmarks.environment import describe
from benchmarks.suites import Options, step, sweep, sweep_page

MIB = 2**20
QUIET = ["sweep", "--no-progress", "--device", "cpu"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one layer per block, and batches of two and of three images."""
    monkeypatch.setattr(sweep, "DEPTH", 10)
    monkeypatch.setattr(sweep, "BATCH_SIZE", 2)
    monkeypatch.setattr(sweep, "DEPTH_BATCHES", {250: 3})
    monkeypatch.setattr(sweep, "GROWTH_RATE", 4)


def cases(record: dict[str, Any]) -> dict[str, list[int]]:
    return {
        entry["varied"]: [case["value"] for case in entry["cases"]]
        for entry in record["settings"]["sweeps"]
    }


@pytest.mark.parametrize("full", [False, True])
def test_sweeps_reach_from_end_to_end(full: bool) -> None:
    record = sweep.plan(Options(full=full))
    found = cases(record)
    assert (min(found["growth rate"]), max(found["growth rate"])) == (8, 48)
    assert (min(found["depth"]), max(found["depth"])) == (22, 250)
    titles = [case["network"] for s in record["settings"]["sweeps"] for case in s["cases"]]
    assert len(set(titles)) == len(titles) == len(record["settings"]["networks"])
    assert ("memory" in record["settings"]["parts"]) == full


def test_naming_values_runs_their_sweep_alone() -> None:
    assert cases(sweep.plan(Options(growth_rates=(20, 7)))) == {"growth rate": [20, 7]}
    assert cases(sweep.plan(Options(depths=(28,)))) == {"depth": [28]}
    both = sweep.plan(Options(growth_rates=(12,), depths=(40,)))
    assert cases(both) == {"growth rate": [12], "depth": [40]}


def test_deeper_networks_get_fewer_images() -> None:
    record = sweep.plan(Options(depths=(10, 22, 28, 100, 250, 256)))
    images = [network["batch_size"] for network in record["settings"]["networks"]]
    assert images == [128, 128, 64, 32, 8, 4]


@pytest.mark.usefixtures("tiny")
def test_small_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUIET, "--growth-rates", "4,6", "--depths", "16", "--rounds", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"sweep.{suffix}" for suffix in ("md", "json", "png", "svg")}
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["complete"]
    for part in ("time", "inference"):
        assert [len(entry["seconds"]) for entry in record[part]] == [2] * 3 * len(sweep.PEERS)
    assert not record["memory"]
    assert len(sweep_page.comparisons(record)) == 3 * 2 * 3  # cases, parts, modes
    text = (tmp_path / "sweep.md").read_text()
    assert "## Growth rates at depth 10" in text
    assert "## Depths at k=4" in text
    assert "MiB |" not in text
    assert "—" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    printed = capsys.readouterr().out
    assert re.search(r"\b18\W+comparisons with the naive network in its faster layout", printed)


@pytest.mark.usefixtures("tiny")
def test_memory_is_in_the_table_and_cases_that_do_not_fit_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        if case.peer == "naive":
            raise measure.MeasurementError("does not fit")
        peak = (64 if case.peer == "naive-channels-last" else 16) * MIB
        return memory.StepMemory(peak, peak, peak, peak, MIB)

    monkeypatch.setattr(step, "measure_in_child", measured)
    arguments = [*QUIET, "--depths", "10", "--parts", "memory", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    text = (tmp_path / "sweep.md").read_text()
    assert "DenseNet-BC-10 (k=4), 3×3×32×32, naive: does not fit" in text
    (row,) = (line for line in text.splitlines() if 'checkpoint="none"' in line)
    assert [cell.strip() for cell in row.split("|")][-3:-1] == ["16.0", "4.00×"]
    assert "Nothing was measured side by side" in text


@pytest.mark.usefixtures("tiny")
def test_interrupted_sweep_has_written_every_finished_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interleave(*arguments: Any, **named: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        measure.interleave(*arguments, **named)
        written.append((tmp_path / "sweep.json").exists())

    monkeypatch.setattr(step, "interleave", interleave)
    arguments = [*QUIET, "--growth-rates", "4,6", "--rounds", "1", "--peers", "naive,ours-none"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == cli.INTERRUPTED
    assert written == [False, True]
    text = (tmp_path / "sweep.md").read_text()
    assert "the results below are partial" in text
    assert re.search(r"\b2\W+comparisons", text)
    (row,) = (line for line in text.splitlines() if line.startswith("| 6, densenet_fast"))
    assert row.count("—") == 4


def filled(own: Callable[[int, str], float]) -> dict[str, Any]:
    """A complete record in which the faster naive layout takes a second everywhere."""
    peers = ("naive", "naive-channels-last", "ours-none", "ours-block")
    record = sweep.plan(Options(growth_rates=(8, 48), peers=peers))
    for case in record["settings"]["sweeps"][0]["cases"]:
        for part in ("time", "inference"):
            for peer, least in (("naive", 2.0), ("naive-channels-last", 1.0)):
                entry = {"network": case["network"], "peer": peer, "seconds": [least, 3.0]}
                record[part].append(entry)
            for peer in peers[2:]:
                seconds = [9.0, own(case["value"], part)]
                record[part].append({"network": case["network"], "peer": peer, "seconds": seconds})
    record.update(command="", complete=True, environment=describe(torch.device("cpu")))
    return record


def test_verdict_of_a_sweep_without_a_slower_case() -> None:
    record = filled(lambda rate, part: 0.8 if (rate, part) == (48, "inference") else 0.5)
    text = sweep_page.page(record).markdown()
    assert "**densenet_fast is slower nowhere**, in 8 comparisons" in text
    assert "Closest: inference of DenseNet-BC-40 (k=48), 32×3×32×32, ours-none: 1.250×." in text
    assert not sweep.failures(record)


def test_verdict_names_every_slower_case() -> None:
    record = filled(lambda rate, part: 1.25 if (rate, part) == (8, "time") else 1.0)
    lines = sweep_page.page(record).markdown().splitlines()
    assert "**densenet_fast is slower in 2 of 8** comparisons" in "\n".join(lines)
    assert [line for line in lines if line.startswith("- ")] == [
        f"- training step of DenseNet-BC-40 (k=8), 32×3×32×32, {peer}: 0.800×"
        for peer in ("ours-none", "ours-block")
    ]
    assert sweep_page.figure(record) is not None


def test_nothing_is_judged_without_naive() -> None:
    record = filled(lambda rate, part: 1.0)
    for part in ("time", "inference"):
        record[part] = [entry for entry in record[part] if entry["peer"].startswith("ours")]
    assert not sweep_page.comparisons(record)
    assert sweep_page.figure(record) is None
