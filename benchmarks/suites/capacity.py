"""The largest batch and the deepest network whose training step fits a given memory.

`benchmarks.prediction` says where to look; what is reported was measured in child processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import MeasurementError, available_bytes
from benchmarks.memory import MemoryCase, measure_in_child
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS
from benchmarks.prediction import memory_plan
from benchmarks.prediction.memory_plan import IMPLEMENTATIONS
from benchmarks.prediction.shapes import FORMATS, blocks, parameters
from benchmarks.progress import Progress
from benchmarks.search import Bracket, Measured, largest_within, search
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.capacity_page import figure, page
from densenet_fast.train.errors import UsageError

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"peers", "networks", "parts", "budgets"})
PARTS = ("batch", "depth")
KNOWN_PEERS = BASIC_PEERS
PEERS = ("naive-channels-last", "memory-efficient", "ours-none", "ours-bottleneck", "ours-block")
QUICK_NETWORKS = ("densenet-bc-100",)
QUICK_BUDGETS = (512,)  # MiB
FULL_BUDGETS = (512, 1024)
# The network whose depth varies.
GROWTH_RATE = 12
BATCH_SIZE = 64

FORMAT = FORMATS["float32"]
# Peer → how `memory_plan` calls it.
PREDICTED: dict[str, str] = {"naive": memory_plan.NAIVE, **IMPLEMENTATIONS}
PROCESS_BYTES = 512 * 2**20  # what a process takes besides: the libraries, a CUDA context
# Work of the progress bar, in multiplications: a child process before it trains.
STARTUP_WORK = 2e10


class MachineTooSmallError(Exception):
    """A case needs more memory than this machine has."""


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    parts = options.parts or PARTS
    if options.networks and "batch" not in parts:
        raise UsageError("--networks names those of the part 'batch', which --parts leaves out")
    names = options.networks or (MAIN_NETWORKS if options.full else QUICK_NETWORKS)
    specs = [("batch", NETWORKS[name]) for name in names]
    specs.append(("depth", densenet_bc(10, GROWTH_RATE, batch_size=BATCH_SIZE)))
    return {
        "settings": {
            "searches": [
                {"part": part, "title": _title(part, spec), "network": spec.to_json()}
                for part, spec in specs
                if part in parts
            ],
            "peers": list(options.peers or PEERS),
            "parts": list(parts),
            "budgets": list(options.budgets or (FULL_BUDGETS if options.full else QUICK_BUDGETS)),
            "seed": options.seed,
        },
        "batch": [],
        "depth": [],
    }


def _title(part: str, spec: NetworkSpec) -> str:
    n, c, h, w = spec.input_shape
    if part == "batch":
        return f"Largest batch of {spec.name} (k={spec.growth_rate}), {c}×{h}×{w}"
    return f"Deepest DenseNet-BC (k={spec.growth_rate}), {n}×{c}×{h}×{w}"


def failures(record: Record) -> list[str]:
    """Cases that could not be measured for another reason than not fitting."""
    return [
        f"{entry['title']}, {entry['budget']} MiB, {entry['peer']}: {entry['error']}"
        for part in PARTS
        for entry in record[part]
        if "error" in entry
    ]


def resting_bytes(spec: NetworkSpec, parameter_bytes: int) -> int:
    """Parameters, their gradients and the images: what a step takes besides its peak."""
    images = spec.batch_size * spec.in_channels * spec.image_size**2 * FORMAT.element
    return 2 * parameter_bytes + images


@dataclass(frozen=True)
class Case:
    """One implementation, one budget, and what varies: sizes count 1, 2, 3, ..."""

    part: str
    spec: NetworkSpec
    peer: str
    budget: int  # bytes
    device: torch.device
    seed: int

    def at(self, size: int) -> NetworkSpec:
        """The network of that size."""
        if self.part == "batch":
            return replace(self.spec, batch_size=size)
        return densenet_bc(6 * size + 4, self.spec.growth_rate, batch_size=self.spec.batch_size)

    def resolution(self, size: int) -> int:
        """Depths are told apart exactly, batches to 1 %."""
        return max(1, size // 100) if self.part == "batch" else 1

    def predict(self, size: int) -> int:
        """Bytes that the size takes, counted from its shape."""
        spec, multiprocessors = self.at(size), None
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            multiprocessors = properties.multi_processor_count
        peak = memory_plan.peak(spec, FORMAT, PREDICTED[self.peer], multiprocessors)
        return resting_bytes(spec, parameters(spec) * FORMAT.parameter) + peak

    def measure(self, size: int) -> int:
        """Bytes that the size takes, measured, if the machine has them."""
        self.require(self.predict(size))
        spec, threads = self.at(size), torch.get_num_threads()
        case = MemoryCase(spec, self.peer, threads, str(self.device), self.seed, peak_only=True)
        measured = measure_in_child(case)
        return resting_bytes(spec, measured.parameters) + measured.peak_gradients_allocated

    def require(self, size: int) -> None:
        """Raises if the machine cannot give that many bytes to a process now."""
        if size + PROCESS_BYTES > available_bytes(self.device):
            raise MachineTooSmallError

    def describe(self, measured: Measured | None) -> dict[str, Any] | None:
        """A measurement as plain data."""
        if measured is None:
            return None
        spec = self.at(measured.size)
        value = spec.batch_size if self.part == "batch" else 6 * measured.size + 4
        return {"value": value, "bytes": measured.bytes, "parameters": parameters(spec)}

    @property
    def work(self) -> float:
        """Of the progress bar."""
        limit = min(self.budget, 2**36)  # deeper networks take long even to predict
        spec = self.at(max(1, largest_within(self.predict, limit)))
        return STARTUP_WORK + sum(block.rows * block.weights for block in blocks(spec))


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Search case by case."""
    settings = record["settings"]
    cases = [
        (
            planned["title"],
            Case(
                planned["part"],
                NetworkSpec.from_json(planned["network"]),
                peer,
                budget * 2**20,
                options.device,
                settings["seed"],
            ),
        )
        for planned in settings["searches"]
        for budget in settings["budgets"]
        for peer in settings["peers"]
    ]
    progress.start(sum(case.work for _, case in cases))
    for title, case in cases:
        progress.describe(f"{title}: {case.peer}")
        entry = {"title": title, "budget": case.budget // 2**20, "peer": case.peer}
        if has(record, case.part, entry, lambda found: "error" not in found):
            progress.advance(case.work)
            continue
        record[case.part].append({**entry, **_find(case, progress)})
        save()


def _find(case: Case, progress: Progress) -> dict[str, Any]:
    """Search one case; most take two measurements."""
    shares = iter([case.work / 2] * 2)

    def measure(size: int) -> int:
        try:
            return case.measure(size)
        finally:
            progress.advance(next(shares, 0.0))

    bracket = Bracket(case.resolution)
    state: dict[str, Any] = {}
    try:
        case.require(case.budget)
        search(bracket, measure, case.predict, case.budget)
    except MachineTooSmallError:
        state = {"machine_too_small": True}
    except MeasurementError as error:
        state = {"error": str(error)}
    progress.advance(sum(shares))
    return {
        "fits": case.describe(bracket.fits),
        "next": case.describe(bracket.next),
        "measurements": bracket.measurements,
        **state,
    }
