"""The capacity suite finds the largest size that fits, measures it and the next, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import CPU, MIB, PROC, cells

from benchmarks import memory
from benchmarks.environment import describe
from benchmarks.measure import MeasurementError, OutOfMemoryError, available_bytes, resident_bytes
from benchmarks.networks import NETWORKS, densenet_bc
from benchmarks.search import MOST_MEASUREMENTS, Bracket, search
from benchmarks.suites import Options, capacity

# ---- The search


def bracket(*, exact: bool) -> Bracket:
    if exact:
        return Bracket(lambda size: 1, degree=2)
    return Bracket(lambda size: max(1, size // 100), degree=1)


@st.composite
def machines(draw: st.DrawFn) -> tuple[Callable[[int], int], int]:
    """What a size needs, which grows but jumps, and a budget."""
    constant, slope = draw(st.integers(0, 10**6)), draw(st.integers(1000, 10**6))
    bend = draw(st.integers(0, 1000))
    errors = draw(st.lists(st.floats(0.7, 1.3), min_size=1, max_size=8))
    budget = draw(st.integers(2 * constant, 10**9))

    def needed(size: int) -> int:
        # The error jumps from power of two to power of two; a larger size needs no less.
        wanted = []
        for power in range(size.bit_length()):
            end = min(size, 2 ** (power + 1) - 1)
            wanted.append((constant + slope * end + bend * end * end) * errors[power % len(errors)])
        return int(max(wanted))

    return needed, budget


@pytest.mark.parametrize("exact", [False, True])
@given(machines(), st.integers(1, 10**10))
def test_result_fits_and_the_next_does_not(
    exact: bool, machine: tuple[Callable[[int], int], int], there: int
) -> None:
    needed, budget = machine
    seen = []

    def measured(size: int) -> int:
        seen.append(size)
        if needed(size) > there:
            raise OutOfMemoryError("does not fit")
        return needed(size)

    found = bracket(exact=exact)
    search(found, measured, budget)
    assert len(seen) == len(set(seen)) == len(found.measured) <= MOST_MEASUREMENTS
    assert found.closed and found.next is not None
    assert needed(found.next.size) > min(budget, there)
    assert found.next.bytes in (None, needed(found.next.size))
    if found.fits is None:
        assert found.next.size == 1
    else:
        assert found.fits.bytes == needed(found.fits.size) <= min(budget, there)
        assert 1 <= found.next.size - found.fits.size <= found.resolution(found.next.size)


@pytest.mark.parametrize("largest", [1, 2, 7, 99, 100, 226, 5000])
def test_what_follows_its_curve_takes_few_measurements(largest: int) -> None:
    batch, depth = bracket(exact=False), bracket(exact=True)
    search(batch, lambda size: 61 + 35 * size, 61 + 35 * largest)
    search(depth, lambda size: 5 + 3 * size + 2 * size**2, 5 + 3 * largest + 2 * largest**2)
    assert batch.low <= largest < batch.low + max(1, largest // 100) + 1
    assert depth.low == largest
    assert len(batch.measured) <= 5 and len(depth.measured) <= 6


def test_a_search_that_does_not_end_is_stopped_and_keeps_what_it_has() -> None:
    found = bracket(exact=True)
    with pytest.raises(MeasurementError, match=r"not found within \d+ measurements"):
        search(found, lambda size: 1, 100)
    assert found.low > 100 and found.next is None


# ---- The suite with measurements that are made up


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Measurements that take no time: naive's are quadratic in depth."""

    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        layers, images = sum(case.spec.block_config), case.spec.batch_size
        each = layers * layers if "naive" in case.peer else 4 * layers
        return memory.StepMemory(images * each * 2**12, None, None, None, 4 * 10**4 * layers)

    counted = Mock(wraps=measured)
    monkeypatch.setattr(capacity, "measure_in_child", counted)
    monkeypatch.setattr(capacity, "available_bytes", lambda device: 64 * 2**30)
    return counted


def test_plans() -> None:
    quick, full = (capacity.SUITE.plan(Options(full=full)) for full in (False, True))
    titles = list(dict.fromkeys(row["title"] for row in full["rows"]))
    assert titles[1:] == [
        "Largest batch of DenseNet-BC-100 (k=12), 3×32×32",
        "Deepest DenseNet-BC (k=12), 64×3×32×32",
    ]
    assert {row["budget"] for row in full["rows"]} == {512, 1024}
    assert len(quick["rows"]) == 2 * len(capacity.COMPARED)
    named = Options(networks=("densenet121",), parts=("batch",), budgets=(7,))
    (network,) = {r["spec"]["name"] for r in capacity.SUITE.plan(named)["rows"]}
    assert network == "DenseNet-121"


def test_quick_form_measures_every_case_and_the_next_one(quick: Mock, run: Any) -> None:
    record, text = run("capacity")
    assert quick.call_count == sum(row["found"]["measurements"] for row in record["rows"])
    assert quick.call_count <= 6 * len(record["rows"])
    assert all(call.args[0].peak_only for call in quick.call_args_list)
    for row in record["rows"]:
        fits, larger = row["found"]["fits"], row["found"]["next"]
        assert fits["bytes"] <= 512 * MIB < larger["bytes"]
        step = max(1, larger["value"] // 100) if row["part"] == "batch" else 6
        assert 0 < larger["value"] - fits["value"] <= step
    batch, depth = cells(text, '512 MiB, densenet_fast, checkpoint="bottleneck"')
    naive_batch, naive_depth = cells(text, "512 MiB, naive, channels_last")
    ratio = int(batch[1].replace(",", "")) / int(naive_batch[1])
    assert float(batch[2][:-1]) == pytest.approx(ratio, abs=0.005)
    assert float(depth[2][:-1]) > 1 and naive_depth[2] == naive_depth[5] == "1.00×"
    layers = sum(densenet_bc(int(depth[1]), 12, batch_size=1).block_config)
    assert float(depth[4]) == pytest.approx(layers / 100, rel=0.01)


def test_what_does_not_fit_at_all_is_said(quick: Mock, run: Any) -> None:
    chosen = ("--networks", "densenet121", "--peers", "ours-block", "--parts", "batch")
    record, text = run("capacity", *chosen, "--budgets", "1,64")
    assert ["fits" in row["found"] for row in record["rows"]] == [False, True]
    assert cells(text, "1 MiB, densenet_fast")[0][-1] == "the smallest does not fit"


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (OutOfMemoryError("does not fit: killed"), 0, "more than there is"),
        (MeasurementError("exit status 1: no"), 1, "naive: exit status 1: no"),
    ],
)
def test_cases_that_cannot_be_measured(
    error: Exception, status: int, shown: str, run: Any, quick: Mock
) -> None:
    def refused(case: memory.MemoryCase) -> Any:
        if case.peer == "naive":
            raise error
        return DEFAULT

    quick.side_effect = refused
    chosen = ("--peers", "naive,ours-none", "--budgets", "8", "--parts", "depth")
    record, text = run("capacity", *chosen, status=status)
    assert shown in text
    assert record["rows"][1]["found"]["closed"]


def test_what_the_machine_has_not_is_not_attempted(quick: Mock, run: Any) -> None:
    chosen = ("--budgets", "500,1000000000", "--parts", "depth", "--peers", "ours-none")
    record, text = run("capacity", *chosen)
    small, large = (row["found"] for row in record["rows"])
    assert "machine_too_small" not in small
    assert "fits" not in large and large["measurements"] == 0
    assert "more than this machine has" in text


def test_a_search_that_stops_leaves_the_largest_open(quick: Mock, run: Any) -> None:
    quick.side_effect = [*[DEFAULT] * 3, MeasurementError("no more of that")]
    chosen = ("--peers", "ours-none", "--budgets", "512", "--parts", "batch")
    _, text = run("capacity", *chosen, status=1)
    (row,) = cells(text, "512 MiB, densenet_fast")
    assert int(row[1].replace(",", "")) >= 4  # under "at least"
    assert "| at least" in text and "| largest" not in text


# ---- Measured for real


@pytest.mark.slow
@PROC
@pytest.mark.usefixtures("forked_children")
def test_small_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", densenet_bc(10, 4, batch_size=2, image_size=32))
    chosen = ("--networks", "tiny", "--parts", "batch", "--peers", "ours-bottleneck")
    record, _ = run("capacity", *chosen, "--budgets", "48")
    (row,) = record["rows"]
    assert row["found"]["fits"]["bytes"] <= 48 * MIB < row["found"]["next"]["bytes"]
    assert row["found"]["measurements"] <= 8


@PROC
def test_available_memory_is_below_the_machines() -> None:
    assert 0 < available_bytes(CPU) < describe(CPU)["memory_mib"] * MIB
    with pytest.raises(MeasurementError, match="has no field VmNothing"):
        resident_bytes("VmNothing")
