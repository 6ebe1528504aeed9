"""Small work: few and small images, where starting operators counts as much as computing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from math import prod

from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.suites import Options
from benchmarks.suites.step import Step

BASIC = (
    *("naive", "naive-channels-last"),
    *("ours-none", "ours-bottleneck", "ours-block", "ours-optimized"),
)
ENGINES = ("onnxruntime", "openvino")  # on the CPU in float32
COMPILED = ("compiled-naive",)  # takes minutes: in the full form, or where it is named

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
}


class Latency(Step):
    """DenseNet-121 on small images, beside inference engines."""

    title = "Small work: latency of a step and of inference"
    options = frozenset({"peers", "parts", "rounds", "amp"})
    parts = ("time", "inference")
    rounds = (15, 50)
    columns = tuple(column for column in Step.columns if column.title != "images/s")

    def specs(self, options: Options) -> list[NetworkSpec]:
        every = {spec.title: spec for part in SMALL.values() for spec in part}
        return sorted(every.values(), key=lambda spec: prod(spec.input_shape))

    def peers(self, options: Options) -> tuple[str, ...]:
        plain = options.device.type == "cpu" and (options.amp or "none") == "none"
        return (*BASIC, *(ENGINES if plain else ()), *(COMPILED if options.full else ()))

    def parts_of(self, spec: NetworkSpec, peer: str) -> Collection[str]:
        there = [part for part, specs in SMALL.items() if spec in specs]
        return [part for part in there if PEERS[peer].deploy is None or part == "inference"]


SUITE = Latency()
