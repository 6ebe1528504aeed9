"""Memory and speed of one training step, and of inference, network by network.

Memory: every implementation in a child process of its own. Time: all implementations in this
process, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import ranking
from benchmarks.measure import (
    MeasurementError,
    OutOfMemoryError,
    available_bytes,
    interleave,
    out_of_memory,
    release_cached,
    tuned_libraries,
)
from benchmarks.memory import (
    MemoryCase,
    autocast,
    figures_in_child,
    make_batch,
    training_step,
)
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec
from benchmarks.peers import BASIC_PEERS, PEERS, build, initial_state
from benchmarks.prediction import memory_plan
from benchmarks.prediction.memory_plan import IMPLEMENTATIONS
from benchmarks.prediction.shapes import FORMATS
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.step_page import compared, figure, page
from densenet_fast.train.errors import UsageError

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"peers", "networks", "parts", "rounds", "amp"})
PARTS = ("memory", "time", "inference")

QUICK_ROUNDS = 5
FULL_ROUNDS = 25
# Work of the progress bar for a child process or a call, in training steps.
WORK = {"memory": 8.0, "time": 1.0, "inference": 0.3}
# How far apart the logits of one network may be, relative to the largest: ten times what float32
# rounds in a DenseNet-121.
AGREEMENT = 1e-5


def plan(options: Options, known: Mapping[str, NetworkSpec] = NETWORKS) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    specs = [known[name] for name in options.networks or MAIN_NETWORKS]
    check_peers(options, specs)
    return {
        "settings": {
            "networks": [spec.to_json() for spec in specs],
            "peers": list(options.peers or BASIC_PEERS),
            "parts": list(options.parts or PARTS),
            "rounds": options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
            "seed": options.seed,
            "amp": options.amp or "none",
        },
        "memory": [],
        "time": [],
        "inference": [],
    }


def check_peers(options: Options, specs: Collection[NetworkSpec]) -> None:
    """Raise `UsageError` for a peer that the user named and that builds none of the networks."""
    for name in options.peers or ():
        if not any(PEERS[name].applies(spec) for spec in specs):
            titles = ", ".join(spec.title for spec in specs)
            raise UsageError(f"the peer {name!r} builds none of the networks measured: {titles}")


def failures(record: Record) -> list[str]:
    """Cases that could not be measured."""
    return [
        f"{entry['network']}, {entry['peer']}: {entry['error']}"
        for part in PARTS
        for entry in record[part]
        if "error" in entry
    ]


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure network by network."""
    settings = record["settings"]
    specs = [NetworkSpec.from_json(data) for data in settings["networks"]]
    cases = [(spec, part, compared(settings, spec, part)) for spec in specs for part in PARTS]
    calls = {part: 1 if part == "memory" else settings["rounds"] + 1 for part in PARTS}
    progress.start(sum(WORK[part] * calls[part] * len(peers) for _, part, peers in cases))
    for spec, part, peers in cases:
        if part == "memory":
            for peer in peers:
                progress.describe(f"{spec.title}: memory, {peer}")
                case = {"network": spec.title, "peer": peer}
                if not has(record, "memory", case, lambda entry: "error" not in entry):
                    _measure_memory(spec, peer, record, options)
                    save()
                progress.advance(WORK[part])
        elif _has_times(record, part, spec):
            progress.advance(WORK[part] * calls[part] * len(peers))
        else:
            progress.describe(f"{spec.title}: {ranking.TIMED[part]}")
            _measure_time(spec, part, record, options, partial(progress.advance, WORK[part]))
            save()


def _has_times(record: Record, part: str, spec: NetworkSpec) -> bool:
    """Whether all rounds of a network were timed, but for what does not fit."""
    settings = record["settings"]

    def whole(entry: dict[str, Any]) -> bool:
        return "error" in entry or len(entry["seconds"]) == settings["rounds"]

    peers = len(compared(settings, spec, part))
    return has(record, part, {"network": spec.title}, whole, count=peers)


def _measure_memory(spec: NetworkSpec, peer: str, record: Record, options: Options) -> None:
    settings = record["settings"]
    case = MemoryCase(
        spec,
        peer,
        torch.get_num_threads(),
        str(options.device),
        settings["seed"],
        settings["amp"],
    )
    record["memory"].append({"network": spec.title, "peer": peer, **figures_in_child(case)})


def _measure_time(
    spec: NetworkSpec, part: str, record: Record, options: Options, advance: Callable[[], None]
) -> None:
    """Time all peers in turn, after an untimed round; entries are filled round by round."""
    settings = record["settings"]
    state = initial_state(spec, settings["seed"])
    calls: dict[str, Callable[[], object]] = {}
    entries: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Tensor] = {}
    torch.compiler.reset()  # what was compiled for other images counts against a limit

    def failed(name: str, error: Exception) -> None:
        kind = "does not fit" if out_of_memory(error) else type(error).__name__
        entries[name]["error"] = f"{kind}: {error}"
        release_cached(options.device)

    with tuned_libraries(options.device):
        for name in compared(settings, spec, part):
            entries[name] = {"network": spec.title, "peer": name, "seconds": []}
            record[part].append(entries[name])
            try:
                call, output = _first_call(spec, name, state, part, settings, options.device)
                _require_agreement(name, output, outputs)
                calls[name] = call
            except Exception as error:  # one implementation's; the others go on
                failed(name, error)
            advance()
        times = {name: entry["seconds"] for name, entry in entries.items()}
        interleave(
            calls, settings["rounds"], options.device, times=times, advance=advance, failed=failed
        )


def _first_call(
    spec: NetworkSpec,
    name: str,
    state: dict[str, Tensor],
    part: str,
    settings: dict[str, Any],
    device: torch.device,
) -> tuple[Callable[[], object], object]:
    """What is timed, and what it returned when it was run once."""
    if part == "time":
        _require_memory(spec, name, settings["amp"], device)
    make = make_training_call if part == "time" else _make_inference_call
    call = make(spec, name, state, device, settings["seed"], settings["amp"])
    return call, call()


def _require_agreement(name: str, output: object, others: dict[str, Tensor]) -> None:
    """Raise if logits in float32 on the CPU are others than those of the same weights elsewhere."""
    if not isinstance(output, Tensor) or not PEERS[name].shares_weights:
        return
    if output.dtype != torch.float32 or output.device.type != "cpu":
        return  # fewer digits, perhaps inside the convolutions alone
    for other, expected in others.items():
        apart = float((output - expected).abs().max() / expected.abs().max())
        if not apart <= AGREEMENT:
            raise MeasurementError(f"logits are {apart:.1e} away from those of {other}")
    others[name] = output


def _require_memory(spec: NetworkSpec, name: str, amp: str, device: torch.device) -> None:
    """Raise before Linux kills the process for memory that a step on the CPU does not find."""
    if device.type != "cpu" or spec.dims != 2 or not spec.bottleneck:
        return  # the allocator raises by itself; the plan knows images and bottlenecks alone
    planned = IMPLEMENTATIONS.get(name, memory_plan.NAIVE)
    fmt = FORMATS["float32" if amp == "none" else "bfloat16"]
    needed = memory_plan.peak(spec, fmt, planned, None)
    available = available_bytes(device)
    if needed > available:
        raise OutOfMemoryError(
            f"a step needs {needed / 2**20:,.0f} MiB, {available / 2**20:,.0f} MiB are available"
        )


def make_training_call(
    spec: NetworkSpec,
    name: str,
    state: dict[str, Tensor],
    device: torch.device,
    seed: int,
    amp: str,
) -> Callable[[], object]:
    model = build(PEERS[name], spec, state, device=device).train()
    images, labels = make_batch(spec, PEERS[name].layout(spec), device, seed)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        training_step(model, images, labels, amp)

    return step


def _make_inference_call(
    spec: NetworkSpec,
    name: str,
    state: dict[str, Tensor],
    device: torch.device,
    seed: int,
    amp: str,
) -> Callable[[], object]:
    peer = PEERS[name]
    model = build(peer, spec, state, device=device).eval()
    images, _ = make_batch(spec, peer.layout(spec), device, seed)
    network = model if peer.deploy is None else peer.deploy(model, images)

    def infer() -> Tensor:
        with torch.no_grad(), autocast(device, amp):
            return network(images)

    return infer
