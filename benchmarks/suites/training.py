"""The main job: train the naive network and `densenet_fast` side by side on handwritten digits.

All implementations start from the same weights and see the same batches in the same order.
Rounding errors grow exponentially while a network trains, so two exact implementations in
float32 drift apart. Agreement is therefore judged in float64 over the first steps, where the drift
stays tiny: for the training losses and then for the loss in evaluation mode, which uses the running
statistics. In float32 the naive network drifts from itself in another memory layout, too.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks import datasets
from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.report import Column, Record, Row, Table, at, four_digits, percent, plain, typical
from benchmarks.suites import Options, Suite, Task
from benchmarks.suites.step import FREED, PEAK, SAVED, memory_task
from benchmarks.train import LEARNING_RATE, training_task

REFERENCE = "naive"
QUICK_PEERS = ("naive", "naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")
TOLERANCE = 1e-9  # of a loss in float64
PARITY_BATCH_SIZE, PARITY_TEST_IMAGES = 16, 60
STAGES = 10  # of the training in float32
# Work of the progress bar: a float64 step costs about five in float32, a child some steps more.
FLOAT64_WORK = 5
CHILD_WORK = 1_500

COLUMNS = (
    *(PEAK, FREED, SAVED),
    Column("s/step", typical("training"), plain, ratio="speed"),
    Column("test loss", at("training", "test_loss"), four_digits),
    Column("test accuracy", at("training", "test_accuracy"), percent),
    Column("float64 losses", at("apart", "parity"), "{:.1e}".format),
    Column("float64 test loss", at("apart", "test_loss"), "{:.1e}".format),
    Column("float32 losses", at("apart", "training"), "{:.1e}".format),
)


class Training(Suite):
    """Three growth rates."""

    title = "Training on handwritten digits: naive against densenet_fast"
    options = frozenset({"growth_rates", "peers", "parts", "rounds"})
    parts = ("parity", "training", "memory")
    known_peers = BASIC_PEERS

    def plan(self, options: Options) -> Record:
        peers = options.peers or (BASIC_PEERS if options.full else QUICK_PEERS)
        peers = peers if REFERENCE in peers else (REFERENCE, *peers)
        rates = options.growth_rates or (12, 24, 32)
        batch_size = 64 if options.full else 16
        epoch = datasets.TRAIN_DIGITS // batch_size
        steps = options.rounds_of((epoch, 3 * epoch))
        return {
            "settings": {
                "depth": 40 if options.full else 22,
                "batch_size": batch_size,
                "growth_rates": list(rates),
                "peers": list(peers),
                "parts": list(options.parts or self.parts),
                "steps": steps,
                "parity_steps": min(steps, 12 if options.full else 6),
                "float64_tolerance": TOLERANCE,
                "learning_rate": LEARNING_RATE,
                "seed": options.seed,
            },
            "rows": [{"growth_rate": rate, "peer": peer} for rate in rates for peer in peers],
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        settings, device = record["settings"], options.device
        images = partial(datasets.digits, seed=settings["seed"])
        for part, steps, weight in (
            ("parity", settings["parity_steps"], FLOAT64_WORK),
            ("training", settings["steps"], 1),
        ):
            for rate in settings["growth_rates"] if part in settings["parts"] else ():
                rows, spec = _of_rate(record, rate), _spec(rate, settings)
                how: dict[str, Any] = {"steps": steps, "seed": settings["seed"]}
                if part == "parity":
                    spec = replace(spec, batch_size=PARITY_BATCH_SIZE)
                    how |= {"dtype": torch.float64, "test_images": PARITY_TEST_IMAGES}
                yield training_task(rows, part, spec, images, device, weight=rate * weight, **how)
        for row in record["rows"] if "memory" in settings["parts"] else ():
            spec = _spec(row["growth_rate"], settings)
            yield memory_task(row, spec, options, settings, CHILD_WORK)

    def tables(self, record: Record) -> list[Table]:
        rows = [{**row, "apart": differences(record, row)} for row in record["rows"]]
        return [Table("", COLUMNS, rows, lambda row: f"k={row['growth_rate']}")]

    def failures(self, record: Record) -> list[str]:
        """Float64 losses that do not agree with the naive network's, and memory not measured.

        In evaluation mode only our own must agree: torchvision's `memory_efficient` cannot.
        """
        found = super().failures(record)
        for row in record["rows"]:
            apart = differences(record, row)
            for key, text in (("parity", "losses"), ("test_loss", "test loss")):
                ours = key == "parity" or PEERS[row["peer"]].ours
                if ours and key in apart and not apart[key] <= TOLERANCE:
                    found.append(
                        f"k={row['growth_rate']}: the float64 {text} of {row['peer']} differs from "
                        f"{REFERENCE}'s by {apart[key]:.1e}, more than {TOLERANCE:.0e}"
                    )
        return found


def _of_rate(record: Record, rate: int) -> list[Row]:
    return [row for row in record["rows"] if row["growth_rate"] == rate]


def _spec(rate: int, settings: dict[str, Any]) -> NetworkSpec:
    return densenet_bc(settings["depth"], rate, batch_size=settings["batch_size"], in_channels=1)


def differences(record: Record, row: Row) -> dict[str, float]:
    """Largest relative differences of a row's losses from the naive network's, by part."""
    (reference,) = (r for r in _of_rate(record, row["growth_rate"]) if r["peer"] == REFERENCE)
    found: dict[str, float] = {}
    if row is reference:
        return found
    for part in ("parity", "training"):
        own, naive = (r.get(part, {}).get("losses", []) for r in (row, reference))
        both = min(len(own), len(naive))  # an interrupted run may have one more of one
        if both:
            size = 1 if part == "parity" else max(1, record["settings"]["steps"] // STAGES)
            found[part] = apart(stages(own[:both], size), stages(naive[:both], size))
    test, expected = (r.get("parity", {}).get("test_loss") for r in (row, reference))
    if test is not None and expected is not None:
        found["test_loss"] = apart([test], [expected])
    return found


def stages(losses: list[float], steps: int) -> list[float]:
    """Mean loss of each stage of so many steps; a short rest joins the last whole stage."""
    whole = max(1, len(losses) // steps)
    bounds = [i * steps for i in range(whole)] + [len(losses)]
    return [statistics.fmean(losses[a:b]) for a, b in pairwise(bounds)]


def apart(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two lists of losses; NaN counts as infinite."""
    pairs = zip(losses, reference, strict=True)
    found = [abs(a - b) / max(abs(b), sys.float_info.min) for a, b in pairs]
    return max(d if d == d else float("inf") for d in found)


SUITE = Training()
