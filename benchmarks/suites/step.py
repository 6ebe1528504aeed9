"""Memory and speed of one training step, and of inference, network by network.

Memory: every implementation in a child process of its own. Time: all implementations in this
process, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.calls import make_call
from benchmarks.measure import (
    MeasurementError,
    OutOfMemoryError,
    available_bytes,
    interleave,
    release_cached,
    tuned_libraries,
)
from benchmarks.memory import MemoryCase, figures_in_child
from benchmarks.networks import MAIN_NETWORKS, NetworkSpec
from benchmarks.peers import BASIC_PEERS, PEERS, initial_state
from benchmarks.report import (
    Column,
    Record,
    Row,
    Table,
    at,
    fastest,
    mebibytes,
    percent,
    plain,
    scaled,
    spread,
    typical,
)
from benchmarks.suites import Advance, Options, Suite, Task, case_of, measured
from densenet_fast.train.errors import UsageError, lack_of_memory

# Work of the progress bar for a child process or a call, in training steps.
WORK = {"memory": 8.0, "time": 1.0, "inference": 0.3}
# How far apart the logits of one network may be, relative to the largest: ten times what float32
# rounds in a DenseNet-121.
AGREEMENT = 1e-5

_peak, _freed, _saved, _after = (
    at("memory", key)
    for key in (
        *("peak_gradients_allocated", "peak_gradients_freed"),
        *("saved_for_backward", "resident_after_forward"),
    )
)
PEAK = Column("peak, MiB", _peak, mebibytes, ratio="naive / this")
FREED = Column("gradients freed, MiB", _freed, mebibytes, ratio="naive / this")
SAVED = Column("saved, MiB", _saved, mebibytes, ratio="naive / this")
STEP = Column("step, s", fastest("time"), plain, ratio="speed")
INFERENCE = Column("inference, s", fastest("inference"), plain, ratio="speed")
COLUMNS = (
    # Four bytes each, whatever autocast computes with.
    Column("parameters, M", at("memory", "parameters"), scaled(4e6)),
    *(PEAK, FREED, SAVED, Column("after forward, MiB", _after, mebibytes)),
    *(STEP, Column("median", typical("time"), plain), Column("spread", spread("time"), percent)),
    Column("images/s", lambda row: row["images"] / STEP.figure(row), plain),
    *(INFERENCE, Column("median", typical("inference"), plain)),
    Column("spread", spread("inference"), percent),
)


class Step(Suite):
    """Any networks and implementations; other suites choose theirs."""

    title = "One training step: memory and speed"
    options = frozenset({"peers", "networks", "parts", "rounds", "amp"})
    parts: tuple[str, ...] = ("memory", "time", "inference")
    rounds = (5, 25)  # in the quick and the full form

    def specs(self, options: Options) -> list[NetworkSpec]:
        """The networks to measure."""
        names = options.networks or MAIN_NETWORKS
        return [self.known_networks[name] for name in names]

    def peers(self, options: Options) -> Sequence[str]:
        """The implementations to compare, unless the user names others."""
        return BASIC_PEERS

    def parts_of(self, spec: NetworkSpec, peer: str) -> Collection[str]:
        """The parts in which an implementation is measured on a network."""
        if not PEERS[peer].applies(spec):
            return ()
        return self.parts if PEERS[peer].deploy is None else ("inference",)

    def plan(self, options: Options) -> Record:
        specs, parts = self.specs(options), options.parts or self.parts
        for name in options.peers or ():
            if not any(PEERS[name].applies(spec) for spec in specs):
                titles = ", ".join(spec.title for spec in specs)
                raise UsageError(
                    f"the peer {name!r} builds none of the networks measured: {titles}"
                )
        wanted = options.peers or self.peers(options)
        peers = [name for name in wanted if PEERS[name].installed]
        rows: list[Row] = []
        for spec in specs:
            for peer in peers:
                own = [part for part in parts if part in self.parts_of(spec, peer)]
                if own:
                    case = {"network": spec.title, "images": spec.batch_size, "peer": peer}
                    rows.append({**case, "parts": own})
        return {
            "settings": {
                "networks": [spec.to_json() for spec in specs],
                "peers": peers,
                "not_installed": [PEERS[n].requires for n in wanted if not PEERS[n].installed],
                "parts": list(parts),
                "rounds": options.rounds_of(self.rounds),
                "seed": options.seed,
                "amp": options.amp or "none",
            },
            "rows": rows,
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        settings = record["settings"]
        for data in settings["networks"]:
            spec = NetworkSpec.from_json(data)
            rows = [row for row in record["rows"] if row["network"] == spec.title]
            for row in rows:
                if "memory" in row["parts"]:
                    yield memory_task(row, spec, options, settings, WORK["memory"])
            for part in ("time", "inference"):
                timed = [row for row in rows if part in row["parts"]]
                work = WORK[part] * (settings["rounds"] + 1) * len(timed)
                call = partial(_measure_times, timed, part, spec, options, settings)
                done = all(_timed(row, part, settings["rounds"]) for row in timed)
                yield Task(f"{spec.title}: {part}", work, done, call)

    def tables(self, record: Record) -> list[Table]:
        titles = dict.fromkeys(row["network"] for row in record["rows"])
        return [
            Table(title, self.columns, [row for row in record["rows"] if row["network"] == title])
            for title in titles
        ]

    columns: Sequence[Column] = COLUMNS

    def findings(self, record: Record) -> list[str]:
        missing = ", ".join(record["settings"]["not_installed"])
        return [f"Not compared, as not installed: {missing}."] if missing else []


def memory_task(
    row: Row, spec: NetworkSpec, options: Options, settings: dict[str, Any], work: float
) -> Task:
    """To measure the memory of a row's step."""
    device, amp = str(options.device), settings.get("amp", "none")
    threads, seed = torch.get_num_threads(), settings["seed"]

    def call(_: Advance) -> None:
        row["memory"] = figures_in_child(MemoryCase(spec, row["peer"], threads, device, seed, amp))

    return Task(f"memory: {case_of(row)}", work, measured(row, "memory"), call)


def _timed(row: Row, part: str, rounds: int) -> bool:
    """Whether all rounds of a row were timed, or its error says why not."""
    figures = row.get(part, {})
    return "error" in figures or len(figures.get("seconds", ())) == rounds


def _measure_times(
    rows: Sequence[Row],
    part: str,
    spec: NetworkSpec,
    options: Options,
    settings: dict[str, Any],
    advance: Advance,
) -> None:
    """Time all peers in turn, after an untimed round; rows are filled round by round."""
    device = options.device
    state = initial_state(spec, settings["seed"])
    figures = {row["peer"]: row.setdefault(part, {}) for row in rows}
    calls: dict[str, Callable[[], Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    torch.compiler.reset()  # what was compiled for other images counts against a limit

    def failed(name: str, error: Exception) -> None:
        small = isinstance(error, OutOfMemoryError) or lack_of_memory(error)
        figures[name]["error"] = f"{'does not fit' if small else type(error).__name__}: {error}"
        release_cached(device)

    with tuned_libraries(device):
        for row in rows:
            name = row["peer"]
            figures[name].clear()
            figures[name]["seconds"] = []
            try:
                if part == "time":
                    _require_memory(row, device)
                of = (spec, name, state, device, settings["seed"], settings["amp"])
                call = make_call(part, *of)
                output = call()
                if part == "inference":
                    _require_agreement(name, output, outputs)
                calls[name] = call
            except Exception as error:  # one implementation's; the others go on
                failed(name, error)
            advance(WORK[part])
        interleave(
            calls,
            settings["rounds"],
            device,
            times={name: found["seconds"] for name, found in figures.items()},
            advance=partial(advance, WORK[part]),
            failed=failed,
        )


def _require_agreement(name: str, output: Tensor, others: dict[str, Tensor]) -> None:
    """Raise if logits in float32 on the CPU are others than those of the same weights elsewhere."""
    exact = output.dtype == torch.float32 and output.device.type == "cpu"
    if not exact or not PEERS[name].shares_weights:
        return  # fewer digits, perhaps inside the convolutions alone
    for other, expected in others.items():
        apart = float((output - expected).abs().max() / expected.abs().max())
        if not apart <= AGREEMENT:
            raise MeasurementError(f"logits are {apart:.1e} away from those of {other}")
    others[name] = output


def _require_memory(row: Row, device: torch.device) -> None:
    """Raise before Linux kills this process for memory that, as measured, a step would not find."""
    if device.type != "cpu" or "memory" not in row:
        return  # a device's allocator raises by itself
    if row["memory"].get("error", "").startswith("does not fit"):
        raise OutOfMemoryError("nor did it in a process of its own")
    needed, there = row["memory"].get("peak_gradients_allocated", 0), available_bytes(device)
    if needed > there:
        raise OutOfMemoryError(
            f"a step needs {needed / 2**20:,.0f} MiB, {there / 2**20:,.0f} MiB are available"
        )


SUITE = Step()
