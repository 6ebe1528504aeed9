"""What the growth rate does to accuracy, and whether densenet_fast trains as well as naive does.

Growth: one network after the other, which differ in the growth rate alone. Parity: several
implementations of one network, trained from the same weights on the same batches, seed by seed;
rounding makes each training a different one, so they are compared by the spread between seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any

from benchmarks import datasets
from benchmarks.networks import densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.report import Column, Record, Row, Table, at, fastest, four_digits, percent, plain
from benchmarks.suites import Options, Suite, Task, case_of
from benchmarks.suites.step import PEAK, memory_task
from benchmarks.train import LEARNING_RATE, trained, training_task

GROWTH_PEER = "ours-bottleneck"
PARITY_PEERS = ("naive-channels-last", "ours-bottleneck")
SEEDS = 3
DEPTHS = (22, 40)  # of the quick and the full form, as what follows
BATCH_SIZES = (16, 64)
GROWTH_RATES = ((4, 8, 16, 32), (4, 8, 12, 16, 24, 32))
PARITY_GROWTH_RATES = (8, 12)
ROUNDS = (3, 10)
LARGE_DATA_ROUNDS = 3  # of a data set with more training images than the next number
LARGE_DATA = 10_000
QUICK_ROUND_IMAGES = 3_200  # a pass over 60,000 is no quick one

CHILD_WORK = 1_500.0  # of the progress bar, in training steps times growth rate

ACCURACY = Column("test accuracy", at("training", "test_accuracy"), percent)
COLUMNS = (
    Column("parameters", at("training", "parameters"), "{:,}".format),
    ACCURACY,
    Column("standard error", lambda row: standard_error(row["training"]), percent),
    Column("test loss", at("training", "test_loss"), four_digits),
    Column("seconds", lambda row: sum(row["training"]["seconds"]) or None, plain),
    Column("fastest step", fastest("training"), plain, ratio="speed"),
    PEAK,
)


class Quality(Suite):
    """Digits, Fashion-MNIST or a folder."""

    title = "Quality: accuracy over the growth rate, and against the naive network"
    options = frozenset({"growth_rates", "peers", "parts", "rounds", "data"})
    parts = ("growth", "parity")
    known_peers = BASIC_PEERS

    def plan(self, options: Options) -> Record:
        full, data = options.full, options.data or "digits"
        parts = options.parts or self.parts
        peers = options.peers or PARITY_PEERS
        if not any(PEERS[name].naive for name in peers):
            peers = (PARITY_PEERS[0], *peers)
        rates = options.growth_rates or GROWTH_RATES[full]
        # Growth rates that the user named hold for both parts.
        parity = PARITY_GROWTH_RATES[full]
        parity = parity if parity in rates else rates[0]
        images = datasets.load(data, options.seed)  # a fault of the files is said before the work
        count = len(images.train_labels)
        batch_size = min(count, BATCH_SIZES[full])
        epoch = count // batch_size
        round_steps = epoch if full else min(epoch, QUICK_ROUND_IMAGES // batch_size)
        large = full and count > LARGE_DATA
        rounds = options.rounds or (LARGE_DATA_ROUNDS if large else ROUNDS[full])
        growth: list[Row] = [
            {"part": "growth", "growth_rate": rate, "seed": options.seed, "peer": GROWTH_PEER}
            for rate in rates
        ]
        seeds: list[Row] = [
            {"part": "parity", "growth_rate": parity, "seed": options.seed + i, "peer": name}
            for i in range(SEEDS)
            for name in peers
        ]
        return {
            "settings": {
                "data": data,
                "train_images": count,
                "test_images": len(images.test_labels),
                "depth": DEPTHS[full],
                "batch_size": batch_size,
                "parts": list(parts),
                "rounds": rounds,
                "round_steps": round_steps,
                "epoch_steps": epoch,
                "steps": rounds * round_steps,
                "parity_peers": list(peers),
                "learning_rate": LEARNING_RATE,
                "seed": options.seed,
            },
            "rows": [row for row in (*growth, *seeds) if row["part"] in parts],
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        settings = record["settings"]
        images = partial(datasets.load, settings["data"], settings["seed"])
        seeds = dict.fromkeys(row["seed"] for row in _of_part(record, "parity"))
        groups = [[row] for row in _of_part(record, "growth")]
        groups += [[row for row in _of_part(record, "parity") if row["seed"] == s] for s in seeds]
        for rows in groups:
            first = rows[0]
            spec = densenet_bc(
                settings["depth"],
                first["growth_rate"],
                batch_size=settings["batch_size"],
                in_channels=1,
            )
            how = {"steps": settings["steps"], "seed": first["seed"], "weight": spec.growth_rate}
            yield training_task(rows, "training", spec, images, options.device, **how)
            if first["part"] == "growth":
                yield memory_task(first, spec, options, settings, CHILD_WORK)

    def tables(self, record: Record) -> list[Table]:
        rates = Table(
            "Growth rates",
            COLUMNS,
            _of_part(record, "growth"),
            lambda row: f"k={row['growth_rate']}",
        )
        seeds = Table(
            "Parity with the naive network",
            COLUMNS,
            _of_part(record, "parity"),
            lambda row: f"seed {row['seed']}",
        )
        return [rates, seeds]

    def findings(self, record: Record) -> list[str]:
        test_images = record["settings"]["test_images"]
        found = []
        peers = record["settings"]["parity_peers"]
        reference = next(name for name in peers if PEERS[name].naive)
        for name in peers if "parity" in record["settings"]["parts"] else ():
            if name != reference:
                own, naive = accuracies(record, name), accuracies(record, reference)
                found.append(f"{name}: {parity_verdict(own, naive, test_images)}.")
        return found

    def failures(self, record: Record) -> list[str]:
        found = super().failures(record)
        for row in record["rows"]:
            figures = row.get("training", {})
            losses = [*figures.get("losses", ()), figures.get("test_loss", 0.0)]
            wrong = next((loss for loss in losses if not isfinite(loss)), None)
            if wrong is not None:
                found.append(f"{case_of(row)}: a loss is {wrong}")
        return found


def _of_part(record: Record, part: str) -> list[Row]:
    return [row for row in record["rows"] if row["part"] == part]


# ---- What chance allows


def standard_error(figures: dict[str, Any]) -> float:
    """Of an accuracy measured on that many images."""
    accuracy = float(figures["test_accuracy"])
    return float((accuracy * (1 - accuracy) / figures["test_images"]) ** 0.5)


def accuracies(record: Record, peer: str) -> list[float]:
    """Accuracy of one implementation for each seed that was trained to the end."""
    rows = [row for row in _of_part(record, "parity") if row["peer"] == peer]
    return [ACCURACY.figure(row) for row in rows if trained(row)]


def parity_verdict(own: Sequence[float], naive: Sequence[float], test_images: int) -> str:
    """Whether accuracies over seeds differ by more than chance allows.

    That is two standard errors of the difference of their means, from the spread of both, and one
    test image where neither has any spread. With so few seeds the rule is coarse: networks that are
    equally good fall outside about once in ten times.
    """
    if min(len(own), len(naive)) < 2:
        return "not judged, fewer than two seeds were trained to the end"
    error = sum(statistics.variance(group) / len(group) for group in (own, naive)) ** 0.5
    apart, allowed = statistics.fmean(own) - statistics.fmean(naive), 2 * error or 1 / test_images
    sizes = f"{100 * apart:+.2f} percentage points, chance explains {100 * allowed:.2f}"
    if abs(apart) <= allowed * (1 + 1e-9):  # equal bounds count, whatever their last bits are
        return f"**as accurate as naive, within seed noise** ({sizes})"
    better = "more" if apart > 0 else "less"
    return f"**{better} accurate than naive, outside seed noise** ({sizes})"


SUITE = Quality()
