"""Small work: few and small images, where starting operators counts as much as computing.

`host` runs DenseNet-121's step with operators that do nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from math import prod

import torch

from benchmarks import host
from benchmarks.measure import MeasurementError
from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.report import Column, Record, Row, at, fastest, milliseconds, percent, typical
from benchmarks.suites import Advance, Options, Task, measured
from benchmarks.suites.step import Step

OURS = ("ours-none", "ours-bottleneck", "ours-block")
BASIC = ("naive", "naive-channels-last", *OURS, "ours-optimized")
ENGINES = ("onnxruntime", "openvino")  # on the CPU in float32
COMPILED = ("compiled-naive",)  # takes minutes: in the full form, or where it is named
HOST_WORK = 100.0  # of the progress bar, in training steps

_of_121 = partial(replace, NETWORKS["densenet121"])
ONE_IMAGE = _of_121(batch_size=1, image_size=64)
# Part → what it measures.
SMALL = {
    "time": [ONE_IMAGE, _of_121(batch_size=2, image_size=64)],
    "inference": [
        _of_121(batch_size=1, image_size=32),
        ONE_IMAGE,
        _of_121(batch_size=1, image_size=224),
        _of_121(batch_size=8, image_size=224),
    ],
    "host": [ONE_IMAGE],
}


class Latency(Step):
    """DenseNet-121 on small images, beside inference engines."""

    title = "Small work: latency of a step and of inference"
    options = frozenset({"peers", "parts", "rounds", "amp"})
    parts = ("time", "inference", "host")
    rounds = (15, 50)
    columns = (
        *(column for column in Step.columns if column.title != "images/s"),
        Column("host, ms", fastest("host"), milliseconds),
        Column("median", typical("host"), milliseconds),
        Column("of a step", lambda row: typical("host")(row) / typical("time")(row), percent),
        Column("own calls", at("host", "calls", "densenet_fast")),
        Column("PyTorch's", at("host", "calls", "aten")),
    )

    def specs(self, options: Options) -> list[NetworkSpec]:
        every = {spec.title: spec for part in SMALL.values() for spec in part}
        return sorted(every.values(), key=lambda spec: prod(spec.input_shape))

    def peers(self, options: Options) -> tuple[str, ...]:
        plain = options.device.type == "cpu" and (options.amp or "none") == "none"
        return (*BASIC, *(ENGINES if plain else ()), *(COMPILED if options.full else ()))

    def parts_of(self, spec: NetworkSpec, peer: str) -> Collection[str]:
        there = [part for part, specs in SMALL.items() if spec in specs]
        if peer not in OURS:
            there = [part for part in there if part != "host"]
        return [part for part in there if PEERS[peer].deploy is None or part == "inference"]

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        rows = [row for row in record["rows"] if "host" in row["parts"]]
        if rows:
            call = partial(_measure_host, rows, record)
            done = all(measured(row, "host") for row in rows)
            yield Task("the host's share", HOST_WORK, done, call)
        yield from super().tasks(options, record)


def _measure_host(rows: list[Row], record: Record, _: Advance) -> None:
    settings, names = record["settings"], [row["peer"] for row in rows]
    # Two classes: the classifier is PyTorch's own, and computes.
    (spec,) = (replace(spec, num_classes=2) for spec in SMALL["host"])
    arguments = (settings["rounds"], torch.get_num_threads(), settings["seed"])
    try:
        found = {entry.pop("peer"): entry for entry in host.measure(spec, names, *arguments)}
    except MeasurementError as error:
        found = {name: {"error": str(error)} for name in names}
    for row in rows:
        row["host"] = found[row["peer"]]


SUITE = Latency()
