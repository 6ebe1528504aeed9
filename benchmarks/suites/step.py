"""Memory and speed of one training step, and of inference, network by network.

Memory: every implementation in a child process of its own. Time: all implementations in this
process, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.measure import MeasurementError, interleave, release_cached, tuned_libraries
from benchmarks.memory import MemoryCase, autocast, make_batch, measure_in_child, training_step
from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save
from benchmarks.suites.step_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"peers", "networks", "parts", "rounds", "amp"})
PARTS = ("memory", "time", "inference")

QUICK_ROUNDS = 5
FULL_ROUNDS = 25
# Work of the progress bar, in training steps.
CHILD_WORK = 8.0
INFERENCE_WORK = 0.3


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    return {
        "settings": {
            "networks": [NETWORKS[name].to_json() for name in options.networks or NETWORKS],
            "peers": list(options.peers or PEERS),
            "parts": list(options.parts or PARTS),
            "rounds": options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
            "seed": options.seed,
            "amp": options.amp or "none",
        },
        "memory": [],
        "time": [],
        "inference": [],
    }


def failures(record: Record) -> list[str]:
    """Cases that could not be measured."""
    return [
        f"{entry['network']}, {entry['peer']}: {entry['error']}"
        for entry in record["memory"]
        if "error" in entry
    ]


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure network by network."""
    settings = record["settings"]
    parts, timed_rounds = settings["parts"], settings["rounds"] + 1
    work = CHILD_WORK * ("memory" in parts) + timed_rounds * (
        ("time" in parts) + INFERENCE_WORK * ("inference" in parts)
    )
    progress.start(work * len(settings["peers"]) * len(settings["networks"]))
    for data in settings["networks"]:
        spec = NetworkSpec.from_json(data)
        if "memory" in parts:
            for peer in settings["peers"]:
                progress.describe(f"{spec.title}: memory, {peer}")
                _measure_memory(spec, peer, record, options)
                progress.advance(CHILD_WORK)
                save()
        if "time" in parts:
            progress.describe(f"{spec.title}: training step")
            _measure_time(spec, "time", record, options, lambda: progress.advance(1.0))
            save()
        if "inference" in parts:
            progress.describe(f"{spec.title}: inference")
            _measure_time(
                spec, "inference", record, options, lambda: progress.advance(INFERENCE_WORK)
            )
            save()


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
    entry: dict[str, Any] = {"network": spec.title, "peer": peer}
    release_cached(options.device)
    try:
        entry.update(asdict(measure_in_child(case)))
    except MeasurementError as error:
        entry["error"] = str(error)
    record["memory"].append(entry)


def _measure_time(
    spec: NetworkSpec, part: str, record: Record, options: Options, advance: Callable[[], None]
) -> None:
    """Time all peers in turn; entries are filled round by round."""
    settings = record["settings"]
    state = initial_state(spec, settings["seed"])
    calls: dict[str, Callable[[], object]] = {}
    times: dict[str, list[float]] = {}
    for name in settings["peers"]:
        make = _make_training_call if part == "time" else _make_inference_call
        calls[name] = make(spec, name, state, options.device, settings["seed"], settings["amp"])
        times[name] = []
        record[part].append({"network": spec.title, "peer": name, "seconds": times[name]})
    with tuned_libraries(options.device):
        interleave(calls, settings["rounds"], options.device, times=times, advance=advance)


def _make_training_call(
    spec: NetworkSpec,
    name: str,
    state: dict[str, torch.Tensor],
    device: torch.device,
    seed: int,
    amp: str,
) -> Callable[[], object]:
    model = build(PEERS[name], spec, state, device=device).train()
    images, labels = make_batch(spec, PEERS[name].memory_format, device, seed)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        training_step(model, images, labels, amp)

    return step


def _make_inference_call(
    spec: NetworkSpec,
    name: str,
    state: dict[str, torch.Tensor],
    device: torch.device,
    seed: int,
    amp: str,
) -> Callable[[], object]:
    model = build(PEERS[name], spec, state, device=device).eval()
    images, _ = make_batch(spec, PEERS[name].memory_format, device, seed)

    def infer() -> None:
        with torch.no_grad(), autocast(device, amp):
            model(images)

    return infer
