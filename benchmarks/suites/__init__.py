"""The suites: each measures into a record of plain data and declares the tables that show it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.networks import NETWORKS, NetworkSpec

if TYPE_CHECKING:
    from benchmarks.report import Row, Table

# Name of a suite → what it answers; `SUITE` in the module of that name is the suite.
SUITES: dict[str, str] = {
    "training": "the main job: train naive and densenet_fast side by side on real images",
    "step": "peak memory and speed of one training step of DenseNet-121 and DenseNet-BC-100",
    "latency": "one image and other small work, beside inference engines",
    "growth": "memory, speed, parameters and FLOPs over growth rates 8 to 48",
    "depth": "how memory and time grow with depth, 22 to 250 layers",
    "networks": "DenseNet-121 to 264, BC-100 and BC-190 beside other libraries and ResNets",
    "capacity": "the largest batch and the deepest network that fit a given memory",
    "quality": "what the growth rate does to accuracy, and parity with the naive network",
    "finetune": "a new classifier on pretrained weights: torchvision, converted, and ours",
    "kernels": "every kernel against this machine's measured peak and PyTorch's own operators",
    "gate": "three small networks: has a change lost memory or speed?",
}
DEFAULT_SUITE = "training"


@dataclass(frozen=True)
class Options:
    """What the user asked for; None means the suite's own choice."""

    full: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    output: Path = Path("results")
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

    def rounds_of(self, form: tuple[int, int]) -> int:
        """Those asked for, or those of the quick or the full form."""
        return self.rounds or form[self.full]


BAR = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}  {desc}"
Record = dict[str, Any]
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Task:
    """A piece of a suite's work, after which its record is saved."""

    text: str
    work: float  # in any unit of the suite
    done: bool  # in the record that is resumed
    call: Callable[[Advance], None]  # puts its figures into the record, and says what it has done


class Suite:
    """What a suite has to say; a record has `settings`, and a row of `rows` for each case.

    A row is made when the suite is planned, with what is measured in it; figures come into it part
    by part. What went wrong stands as `error` where the figures would be.
    """

    title: str
    options: frozenset[str] = frozenset()  # names of the `Options` that not all suites take
    parts: tuple[str, ...] = ()
    known_networks: Mapping[str, NetworkSpec] = NETWORKS
    known_peers: Collection[str] | None = None  # None: all of them

    def plan(self, options: Options) -> Record:
        """Settings and rows of a run; raises `UsageError` before any work."""
        raise NotImplementedError

    def tasks(self, options: Options, record: Record) -> Iterable[Task]:
        """The work, in its order."""
        raise NotImplementedError

    def tables(self, record: Record) -> list[Table]:
        """What the page shows, of a record that may be partial."""
        raise NotImplementedError

    def findings(self, record: Record) -> list[str]:
        """What the tables do not say by themselves."""
        return []

    def failures(self, record: Record) -> list[str]:
        """What must not be and is; such a run exits with an error."""
        return errors(record["rows"])


def run_tasks(tasks: Iterable[Task], save: Callable[[], object], *, visible: bool = True) -> None:
    """Do what is not done yet, saving after each; `visible`: with a bar on standard error."""
    from tqdm import tqdm

    planned = list(tasks)
    total = sum(task.work for task in planned)
    with tqdm(total=total, bar_format=BAR, disable=not visible, mininterval=0.5) as bar:
        done = 0.0
        for task in planned:
            bar.set_description_str(task.text, refresh=False)
            if not task.done:
                task.call(bar.update)
                save()
            done += task.work
            bar.update(done - bar.n)  # what it has not said


def measured(row: Row, part: str) -> bool:
    """Whether a row has a part's figures, which no error kept away."""
    return part in row and "error" not in row[part]


def case_of(row: Row) -> str:
    """What a row was measured on, by whom."""
    shown = {"title": "{}", "network": "{}", "growth_rate": "k={}", "seed": "seed {}"}
    shown |= {"budget": "{} MiB", "peer": "{}"}
    return ", ".join(text.format(row[key]) for key, text in shown.items() if key in row)


def errors(rows: Iterable[Row]) -> list[str]:
    """Every part that could not be measured, and why."""
    return [
        f"{part} of {case_of(row)}: {figures['error']}"
        for row in rows
        for part, figures in row.items()
        if isinstance(figures, dict) and "error" in figures
    ]


def load(name: str) -> Suite:
    """The suite of that name."""
    suite: Suite = importlib.import_module(f"benchmarks.suites.{name}").SUITE
    return suite
