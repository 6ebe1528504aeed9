"""The largest batch and the deepest network whose training step fits a given memory.

What a step takes: parameters, their gradients, the images, and the step's peak beyond those, as
much as a device must have. Every size is measured in a child process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.measure import MeasurementError, available_bytes
from benchmarks.memory import MemoryCase, measure_in_child
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS
from benchmarks.report import Column, Record, Row, Table, at, mebibytes, scaled
from benchmarks.search import Bracket, Measured, search
from benchmarks.suites import Advance, Options, Suite, Task, measured
from densenet_fast.train.errors import UsageError

COMPARED = ("naive-channels-last", "memory-efficient", "ours-none", "ours-bottleneck", "ours-block")
QUICK_NETWORKS = ("densenet-bc-100",)
BUDGETS = ((512,), (512, 1024))  # MiB, of the quick and the full form
# The network whose depth varies.
GROWTH_RATE, BATCH_SIZE = 12, 64
PROCESS_BYTES = 512 * 2**20  # what a process takes besides: the libraries, a CUDA context
ELEMENT = 4  # bytes


@dataclass(frozen=True)
class Case:
    """One implementation and what varies: sizes count 1, 2, 3, ..."""

    part: str
    spec: NetworkSpec
    peer: str
    device: torch.device
    seed: int

    def at(self, size: int) -> NetworkSpec:
        """The network of that size."""
        if self.part == "batch":
            return replace(self.spec, batch_size=size)
        return densenet_bc(6 * size + 4, self.spec.growth_rate, batch_size=self.spec.batch_size)

    @property
    def bracket(self) -> Bracket:
        """Depths are told apart exactly, batches to 1 %; memory is linear in the batch."""
        if self.part == "batch":
            return Bracket(lambda size: max(1, size // 100), degree=1)
        return Bracket(lambda size: 1, degree=2)

    def measure(self, size: int, parameters: dict[int, int]) -> int:
        """Bytes that the size takes; its parameters' bytes go into `parameters`."""
        spec, threads = self.at(size), torch.get_num_threads()
        case = MemoryCase(spec, self.peer, threads, str(self.device), self.seed, peak_only=True)
        found = measure_in_child(case)
        parameters[size] = found.parameters
        images = spec.batch_size * spec.in_channels * spec.image_size**spec.dims * ELEMENT
        return 2 * found.parameters + images + found.peak_gradients_allocated

    def value(self, measured: Measured) -> int:
        """Images or layers of a size."""
        return measured.size if self.part == "batch" else 6 * measured.size + 4


def _largest(key: str) -> Callable[[Row], Any]:
    """A figure of the largest size that fits, where the search came to its end."""
    return lambda row: row["found"]["fits"][key] if row["found"]["closed"] else None


def _least(row: Row) -> int | None:
    """Images or layers that fit, where the search stopped before its end."""
    return None if row["found"]["closed"] else row["found"]["fits"]["value"]


COLUMNS = (
    Column("largest", _largest("value"), "{:,}".format, ratio="this / naive", larger=True),
    Column("takes, MiB", _largest("bytes"), mebibytes),
    Column("at least", _least, "{:,}".format),
    Column("next", at("found", "next", "value"), "{:,}".format),
    Column(
        "takes, MiB",
        lambda row: row["found"]["next"]["bytes"] or "more than there is",
        lambda value: value if isinstance(value, str) else mebibytes(value),
    ),
)
REMARK = Column("remark", lambda row: _remark(row))
MILLIONS = Column(
    "parameters, M",
    _largest("parameters"),
    scaled(4e6),
    ratio="this / naive",
    larger=True,
)


class Capacity(Suite):
    """Batches of known networks, and depths of a DenseNet-BC."""

    title = "What fits a given memory: the largest batch and the deepest network"
    options = frozenset({"peers", "networks", "parts", "budgets"})
    parts = ("batch", "depth")
    known_peers = BASIC_PEERS

    def plan(self, options: Options) -> Record:
        parts = options.parts or self.parts
        if options.networks and "batch" not in parts:
            raise UsageError("--networks names those of the part 'batch', which --parts leaves out")
        names = options.networks or (MAIN_NETWORKS if options.full else QUICK_NETWORKS)
        specs = [("batch", NETWORKS[name]) for name in names]
        specs.append(("depth", densenet_bc(10, GROWTH_RATE, batch_size=BATCH_SIZE)))
        budgets = options.budgets or BUDGETS[options.full]
        return {
            "settings": {
                "parts": list(parts),
                "budgets": list(budgets),
                "peers": list(options.peers or COMPARED),
                "seed": options.seed,
            },
            "rows": [
                {
                    "title": _title(part, spec),
                    "part": part,
                    "spec": spec.to_json(),
                    "budget": budget,
                    "peer": peer,
                }
                for part, spec in specs
                if part in parts
                for budget in budgets
                for peer in options.peers or COMPARED
            ],
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        for row in record["rows"]:
            text = f"{row['title']}: {row['peer']}"
            call = partial(_find, row, options, record["settings"]["seed"])
            yield Task(text, row["budget"], measured(row, "found"), call)

    def tables(self, record: Record) -> list[Table]:
        titles = {row["title"]: row["part"] for row in record["rows"]}
        return [
            Table(
                title,
                (*COLUMNS[:2], *((MILLIONS,) if part == "depth" else ()), *COLUMNS[2:], REMARK),
                [row for row in record["rows"] if row["title"] == title],
                lambda row: f"{row['budget']:,} MiB",
            )
            for title, part in titles.items()
        ]


def _remark(row: Row) -> str | None:
    """Why there is no figure of a size that fits."""
    if row["found"].get("machine_too_small"):
        return "more than this machine has"
    return (
        "the smallest does not fit"
        if row["found"]["closed"] and "fits" not in row["found"]
        else None
    )


def _title(part: str, spec: NetworkSpec) -> str:
    n, c, h, w = spec.input_shape
    if part == "batch":
        return f"Largest batch of {spec.name} (k={spec.growth_rate}), {c}×{h}×{w}"
    return f"Deepest DenseNet-BC (k={spec.growth_rate}), {n}×{c}×{h}×{w}"


def _find(row: Row, options: Options, seed: int, _: Advance) -> None:
    """Search one case."""
    spec = NetworkSpec.from_json(row["spec"])
    case = Case(row["part"], spec, row["peer"], options.device, seed)
    bracket, budget, parameters = case.bracket, row["budget"] * 2**20, dict[int, int]()
    state: dict[str, Any] = {}
    if budget + PROCESS_BYTES > available_bytes(options.device):
        state["machine_too_small"] = True
    else:
        try:
            search(bracket, lambda size: case.measure(size, parameters), budget)
        except MeasurementError as error:
            state["error"] = str(error)

    row["found"] = {"closed": bracket.closed, "measurements": len(bracket.measured), **state}
    for key, found in (("fits", bracket.fits), ("next", bracket.next)):
        if found is not None:
            weights = parameters.get(found.size)
            figures = {"value": case.value(found), "bytes": found.bytes, "parameters": weights}
            row["found"][key] = figures


SUITE = Capacity()
