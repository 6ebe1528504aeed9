"""The suites: each measures into a record of plain data and renders its page from that."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.progress import Progress
    from benchmarks.report import Page

# Name of a suite → what it answers; the module of the same name holds it.
SUITES: dict[str, str] = {
    "training": "the main job: train naive and densenet_fast side by side on real images",
    "step": "peak memory and speed of one training step of DenseNet-121 and DenseNet-BC-100",
    "latency": "one image and other small work, and the host's share of a step",
    "growth": "memory, speed, parameters and FLOPs over growth rates 8 to 48",
    "depth": "how memory and time grow with depth, 22 to 250 layers",
    "networks": "DenseNet-121 to 264, BC-100 and BC-190 beside other libraries and ResNets",
    "capacity": "the largest batch and the deepest network that fit a given memory",
    "quality": "what the growth rate does to accuracy, and parity with the naive network",
    "finetune": "a new classifier on pretrained weights: torchvision, converted, and ours",
    "kernels": "every kernel against this machine's measured peak and PyTorch's own operators",
    "gate": "a few ratios with generous floors: has a change made something much worse?",
    "predict": "a prediction, not a measurement: the same step on A100, H100 and RTX 4090",
}
DEFAULT_SUITE = "training"


@dataclass(frozen=True)
class Options:
    """What the user asked for; None means the suite's own choice."""

    full: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    peers: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    growth_rates: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    dims: int | None = None
    rounds: int | None = None
    amp: str | None = None
    budgets: tuple[int, ...] | None = None  # MiB
    data: str | None = None
    output: Path = Path("results")


Record = dict[str, Any]
Save = Callable[[], object]


def has(
    record: Record, part: str, case: dict[str, Any], whole: Callable[[Any], bool], *, count: int = 1
) -> bool:
    """Whether a case has all its entries; otherwise they are dropped, to be measured anew."""
    entries = [entry for entry in record[part] if case.items() <= entry.items()]
    if len(entries) == count and all(map(whole, entries)):
        return True
    record[part] = [entry for entry in record[part] if not case.items() <= entry.items()]
    return False


class Suite(Protocol):
    """The interface of a suite's module. `KNOWN_PEERS` says which peers it takes, if not all."""

    OPTIONS: frozenset[str]  # names of the `Options` beyond the common ones that it takes
    PARTS: tuple[str, ...]

    def plan(self, options: Options) -> Record:
        """Settings of a run and empty places for its figures."""

    def run(self, options: Options, record: Record, progress: Progress, save: Save) -> None:
        """Measure what `record` does not have, calling `save` whenever something was added.

        A record that is resumed holds the finished cases of an earlier run, and perhaps one that
        was interrupted, which is measured anew.
        """

    def page(self, record: Record) -> Page:
        """The page of a record, which may be partial."""

    def figure(self, record: Record) -> Figure | None:
        """The plot of a record, or None when there is nothing to plot yet."""

    def failures(self, record: Record) -> list[str]:
        """What must not be and is; such a run exits with an error."""


def load(name: str) -> Suite:
    """The suite of that name."""
    return cast(Suite, importlib.import_module(f"benchmarks.suites.{name}"))
