"""The capacity suite finds the largest size that fits, measures it and the next, and says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure, memory, search
from benchmarks.environment import describe
from benchmarks.measure import MeasurementError, OutOfMemoryError
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, densenet_bc
from benchmarks.prediction import memory_plan
from benchmarks.prediction.shapes import FORMATS, parameters
from benchmarks.search import Bracket
from benchmarks.suites import Options, capacity, capacity_page

CPU = torch.device("cpu")
MIB = 2**20
QUIET = ["capacity", "--no-progress", "--device", "cpu"]
PROC = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
TINY = densenet_bc(10, 4, batch_size=2, image_size=16)


# ---- The search


def coarse(size: int) -> int:
    return max(1, size // 100)


def exact(size: int) -> int:
    return 1


@st.composite
def machines(draw: st.DrawFn) -> tuple[Callable[[int], int], Callable[[int], int], int]:
    """A prediction, what is really needed, at most 30 % off and never falling, and a budget."""
    constant, slope = draw(st.integers(0, 10**6)), draw(st.integers(1000, 10**6))
    bend = draw(st.integers(0, 1000))
    errors = draw(st.lists(st.floats(0.7, 1.3), min_size=1, max_size=8))
    budget = draw(st.integers(2 * constant, 10**9))

    def predict(size: int) -> int:
        return constant + slope * size + bend * size * size

    def needed(size: int) -> int:
        # The error jumps from power of two to power of two; a larger size needs no less.
        powers = range(size.bit_length())
        ends = [min(size, 2 ** (power + 1) - 1) for power in powers]
        wanted = (
            predict(end) * errors[power % len(errors)]
            for power, end in zip(powers, ends, strict=True)
        )
        return int(max(wanted))

    return predict, needed, budget


@pytest.mark.parametrize("resolution", [coarse, exact])
@given(machines(), st.integers(1, 10**10))
def test_result_fits_and_the_next_does_not(
    resolution: Callable[[int], int],
    machine: tuple[Callable[[int], int], Callable[[int], int], int],
    there: int,
) -> None:
    predict, needed, budget = machine
    seen = []

    def measured(size: int) -> int:
        seen.append(size)
        if needed(size) > there:
            raise OutOfMemoryError("does not fit")
        return needed(size)

    bracket = Bracket(resolution)
    try:
        search.search(bracket, measured, predict, budget)
    except MeasurementError:
        # Exact sizes among very many, or far less memory than the budget.
        assert len(seen) == search.MOST_MEASUREMENTS
        assert there < budget or (resolution is exact and seen[0] > 1000)
        return
    assert len(seen) == len(set(seen)) == bracket.measurements <= search.MOST_MEASUREMENTS
    assert bracket.next is not None
    assert needed(bracket.next.size) > min(budget, there)
    assert bracket.next.bytes in (None, needed(bracket.next.size))
    if bracket.fits is None:
        assert bracket.next.size == 1
    else:
        assert bracket.fits.bytes == needed(bracket.fits.size) <= min(budget, there)
        gap = bracket.next.size - bracket.fits.size
        assert 1 <= gap <= resolution(bracket.next.size)


@given(st.integers(1, 2000), st.floats(0.7, 1.3))
def test_constant_error_is_corrected_by_the_first_measurement(largest: int, error: float) -> None:
    bracket = Bracket(coarse)
    budget = int(1000 * (largest + 0.5) * error)
    search.search(bracket, lambda size: int(1000 * size * error), lambda size: 1000 * size, budget)
    assert bracket.low <= largest < bracket.low + coarse(largest + 20) + 1
    assert bracket.measurements <= 4


def test_right_prediction_takes_two_measurements() -> None:
    for largest in (1, 7, 99, 100, 226, 5000):
        bracket = Bracket(coarse)
        search.search(bracket, lambda size: size, lambda size: size, largest)
        assert (bracket.low, bracket.measurements) == (largest, 2)
    bracket = Bracket(exact)
    search.search(bracket, lambda size: size + 1, lambda size: size, 1)
    assert (bracket.fits, bracket.measurements) == (None, 1)


def test_search_that_does_not_end_is_stopped_and_keeps_what_it_has() -> None:
    bracket = Bracket(exact)
    with pytest.raises(MeasurementError, match=r"not found within \d+ measurements"):
        search.search(bracket, lambda size: 1, lambda size: size, 100)
    assert bracket.low > 100
    assert bracket.next is None


# ---- The suite with measurements that are made up


def predicted_peak(case: memory.MemoryCase) -> int:
    planned = capacity.PREDICTED[case.peer]
    return memory_plan.peak(case.spec, FORMATS["float32"], planned, None)


def as_measured(case: memory.MemoryCase, peak: int) -> memory.StepMemory:
    return memory.StepMemory(peak, None, None, None, 4 * parameters(case.spec))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[memory.MemoryCase]:
    """Measurements that take no time: 5 % more than predicted, for every implementation."""
    cases: list[memory.MemoryCase] = []

    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        cases.append(case)
        return as_measured(case, predicted_peak(case) * 21 // 20)

    monkeypatch.setattr(capacity, "measure_in_child", measured)
    monkeypatch.setattr(capacity, "available_bytes", lambda device: 64 * 2**30)
    return cases


def filled(options: Options) -> dict[str, Any]:
    record = capacity.plan(options)
    from benchmarks.progress import Progress

    capacity.run(options, record, Progress(visible=False), lambda: None)
    record.update(command="", complete=True, environment=describe(CPU))
    return json.loads(json.dumps(record))


def rows(text: str, label: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_every_peer_has_a_prediction() -> None:
    assert set(capacity.PREDICTED) == set(capacity.KNOWN_PEERS)


@pytest.mark.parametrize("full", [False, True])
def test_plan(full: bool) -> None:
    settings = capacity.plan(Options(full=full))["settings"]
    assert settings["budgets"] == ([512, 1024] if full else [512])
    titles = [entry["title"] for entry in settings["searches"]]
    assert len(titles) == (3 if full else 2)
    assert titles[-1] == "Deepest DenseNet-BC (k=12), 64×3×32×32"
    assert "Largest batch of DenseNet-BC-100 (k=12), 3×32×32" in titles
    named = capacity.plan(Options(networks=("densenet121",), parts=("batch",), budgets=(7,)))
    (entry,) = named["settings"]["searches"]
    assert entry["network"]["name"] == "DenseNet-121"


def test_quick_form_measures_every_case_and_the_next_one(quick: list[memory.MemoryCase]) -> None:
    record = filled(Options())
    assert len(quick) == sum(e["measurements"] for part in capacity.PARTS for e in record[part])
    assert len(quick) <= 4 * 2 * len(capacity.PEERS)
    assert all(case.peak_only for case in quick)
    for part in capacity.PARTS:
        assert [entry["peer"] for entry in record[part]] == list(capacity.PEERS)
        for entry in record[part]:
            fits, larger = entry["fits"], entry["next"]
            assert fits["bytes"] <= 512 * MIB < larger["bytes"]
            step = max(1, larger["value"] // 100) if part == "batch" else 6
            assert 0 < larger["value"] - fits["value"] <= step
    for entry in record["depth"]:
        spec = densenet_bc(entry["fits"]["value"], 12, batch_size=64)
        assert entry["fits"]["parameters"] == parameters(spec)
    assert not capacity.failures(record)
    text = capacity_page.page(record).markdown()
    assert "—" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    batch, depth = rows(text, 'densenet_fast, checkpoint="bottleneck"')
    naive_batch, naive_depth = rows(text, "naive, channels_last")
    assert float(batch[1][:-1]) == pytest.approx(int(batch[0]) / int(naive_batch[0]), abs=0.005)
    assert float(depth[3][:-1]) > float(depth[1][:-1]) > 1
    assert naive_depth[1] == naive_depth[3] == "1.00×"
    assert "In 512 MiB the naive network has up to " in text
    figure = capacity_page.figure(record)
    assert figure is not None
    assert len(figure.axes) == 2


def test_budgets_networks_and_peers_can_be_chosen(quick: list[memory.MemoryCase]) -> None:
    options = Options(
        budgets=(64, 32), networks=MAIN_NETWORKS, peers=("naive", "ours-block"), parts=("batch",)
    )
    record = filled(options)
    assert [entry["budget"] for entry in record["batch"]] == [64, 64, 32, 32] * 2
    assert not record["depth"]
    text = capacity_page.page(record).markdown()
    assert "## Deepest" not in text
    first, second = (line for line in text.splitlines() if line.startswith("- ours-block"))
    for over in (first, second):  # DenseNet-121's parameters and gradients take 61 MiB
        assert "does not fit: a step with one image takes" in over
        assert over.endswith("MiB more than the budget.")


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (OutOfMemoryError("does not fit: killed"), 0, "takes more than there is"),
        (MeasurementError("exit status 1: no"), 1, "- naive: not measured: exit status 1: no"),
    ],
)
def test_cases_that_cannot_be_measured(
    error: Exception,
    status: int,
    shown: str,
    tmp_path: Path,
    quick: list[memory.MemoryCase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    works = capacity.measure_in_child

    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        if case.peer == "naive":
            raise error
        return works(case)

    monkeypatch.setattr(capacity, "measure_in_child", measured)
    arguments = [*QUIET, "--peers", "naive,ours-none", "--budgets", "8", "--parts", "depth"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == status
    text = (tmp_path / "capacity.md").read_text()
    assert shown in text
    assert ("FAILED: Deepest DenseNet-BC" in capsys.readouterr().err) == bool(status)
    ((layers, *_),) = rows(text, 'densenet_fast, checkpoint="none"')
    assert layers in ("10", "does not fit")


def test_what_the_machine_has_not_is_not_attempted(
    quick: list[memory.MemoryCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda device: 1024 * MIB)
    record = filled(Options(budgets=(500, 10**9), parts=("depth",), peers=("ours-none",)))
    assert all(case.spec.block_config[0] < 100 for case in quick)
    small, large = record["depth"]
    assert "machine_too_small" not in small
    assert (large["fits"], large["measurements"]) == (None, 0)
    text = capacity_page.page(record).markdown()
    assert "- ours-none: needs more memory than this machine has." in text
    assert not capacity.failures(record)


def test_next_size_that_the_machine_has_not_leaves_the_largest_open(
    quick: list[memory.MemoryCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda device: 1024 * MIB)
    monkeypatch.setattr(
        capacity, "measure_in_child", lambda case: as_measured(case, predicted_peak(case) * 3 // 4)
    )
    record = filled(Options(budgets=(511,), parts=("batch",), peers=("ours-none", "naive")))
    text = capacity_page.page(record).markdown()
    ((images, compared, _, larger, _),) = rows(text, 'densenet_fast, checkpoint="none"')
    assert images.startswith("at least ")
    assert compared == larger == "—"
    assert capacity_page.figure(record) is None


def test_interrupted_run_has_written_every_finished_case(
    tmp_path: Path, quick: list[memory.MemoryCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = capacity.measure_in_child

    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        if case.peer == "ours-none":
            saved = json.loads((tmp_path / "capacity.json").read_text())
            assert [entry["peer"] for entry in saved["batch"]] == ["naive"]
            raise KeyboardInterrupt
        return works(case)

    monkeypatch.setattr(capacity, "measure_in_child", measured)
    arguments = [*QUIET, "--peers", "naive,ours-none", "--output", str(tmp_path)]
    assert cli.main(arguments) == cli.INTERRUPTED
    text = (tmp_path / "capacity.md").read_text()
    assert "the results below are partial" in text
    assert len(rows(text, "naive, contiguous")) == 1
    assert not rows(text, "densenet_fast")
    assert (tmp_path / "capacity.png").exists()


def test_page_of_a_record_without_results() -> None:
    record = capacity.plan(Options())
    record.update(command="", complete=False, environment=describe(CPU))
    assert "## Largest batch" in capacity_page.page(record).markdown()
    assert capacity_page.figure(record) is None


# ---- Measured for real


@PROC
def test_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", replace(TINY, image_size=32))
    arguments = [*QUIET, "--networks", "tiny", "--parts", "batch", "--peers", "ours-bottleneck"]
    assert cli.main([*arguments, "--budgets", "48", "--output", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"capacity.{suffix}" for suffix in ("md", "json", "png", "svg")}
    record = json.loads((tmp_path / "capacity.json").read_text())
    (entry,) = record["batch"]
    assert entry["fits"]["bytes"] <= 48 * MIB < entry["next"]["bytes"]
    assert entry["measurements"] <= 8


@PROC
@pytest.mark.slow
@pytest.mark.parametrize("peer", capacity.PEERS)
def test_measured_bytes_are_near_the_predicted(peer: str) -> None:
    case = capacity.Case("batch", densenet_bc(40, 12, batch_size=1), peer, 128 * MIB, CPU, 0)
    size = search.largest_within(case.predict, case.budget)
    assert case.measure(size) == pytest.approx(case.predict(size), rel=0.1)


@PROC
def test_only_the_peak_is_measured_if_nothing_else_is_asked_for() -> None:
    figures = memory.measure_in_child(memory.MemoryCase(TINY, "ours-none", 1, peak_only=True))
    assert figures.peak_gradients_allocated > 0
    assert figures.saved_for_backward is None
    assert figures.parameters == 4 * parameters(TINY)


@PROC
def test_available_memory_is_below_the_machines() -> None:
    assert 0 < measure.available_bytes(CPU) < describe(CPU)["memory_bytes"]
    with pytest.raises(MeasurementError, match="has no field VmNothing"):
        measure.resident_bytes("VmNothing")


def test_networks_without_their_part_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["capacity", "--networks", "densenet121", "--parts", "depth"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--output", str(tmp_path)])
    assert "--networks names those of the part 'batch'" in capsys.readouterr().err
