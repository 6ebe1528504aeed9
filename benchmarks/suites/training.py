"""The main job: train the naive network and `densenet_fast` side by side on handwritten digits.

All implementations start from the same weights and see the same batches in the same order.
Rounding errors grow exponentially while a network trains, so two exact implementations in
float32 drift apart. Agreement is therefore judged twice:

* in float64 over the first stages, where the drift stays tiny: a fixed tolerance, for the
  training losses and then for the loss in evaluation mode, which uses the running statistics;
* in float32 over the whole training, against the drift between the naive network and itself
  in another memory layout, which computes the same sums in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks import digits
from benchmarks.datasets import Images
from benchmarks.memory import MemoryCase, figures_in_child
from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.training_page import REFERENCE, failures, figure, page
from benchmarks.train import LEARNING_RATE, new_entry, tested, train

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"growth_rates", "peers", "parts", "rounds"})
PARTS = ("parity", "training", "memory")
KNOWN_PEERS = BASIC_PEERS

GROWTH_RATES = (12, 24, 32)
QUICK_PEERS = ("naive", "naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")
FLOAT64_TOLERANCE = 1e-9
PARITY_TEST_IMAGES = 60
# Work of the progress bar: a float64 step costs about five in float32, a child some steps more.
FLOAT64_WORK = 5
CHILD_WORK = 1_500


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    peers = options.peers or (BASIC_PEERS if options.full else QUICK_PEERS)
    if REFERENCE not in peers:
        peers = (REFERENCE, *peers)
    batch_size = 64 if options.full else 16
    epoch = (1_797 - digits.TEST_IMAGES) // batch_size
    steps = options.rounds or (3 * epoch if options.full else epoch)
    return {
        "settings": {
            "depth": 40 if options.full else 22,
            "batch_size": batch_size,
            "growth_rates": list(options.growth_rates or GROWTH_RATES),
            "peers": list(peers),
            "parts": list(options.parts or PARTS),
            "steps": steps,
            "stage_steps": max(1, steps // (10 if options.full else 8)),
            "parity_steps": min(steps, 12 if options.full else 6),
            "parity_stage_steps": 2,
            "parity_batch_size": 16,
            "parity_test_images": PARITY_TEST_IMAGES,
            "float64_tolerance": FLOAT64_TOLERANCE,
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
        },
        "parity": [],
        "training": [],
        "memory": [],
    }


def spec_for(growth_rate: int, settings: dict[str, Any]) -> NetworkSpec:
    """The network that is trained at one growth rate."""
    return densenet_bc(
        settings["depth"], growth_rate, batch_size=settings["batch_size"], in_channels=1
    )


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure all parts, growth rate by growth rate."""
    settings = record["settings"]
    rates, parts = settings["growth_rates"], settings["parts"]
    peers = len(settings["peers"])
    trained = [part for part in ("parity", "training") if part in parts]
    work = sum(sum(rates) * _steps(settings, part) * _work(part) * peers for part in trained)
    work += len(rates) * peers * CHILD_WORK * ("memory" in parts)
    progress.start(work)
    images = digits.load(seed=settings["seed"])
    for part in trained:
        for rate in rates:
            progress.describe(f"{part}, k={rate}")
            if has(record, part, {"growth_rate": rate}, tested, count=peers):
                progress.advance(rate * _steps(settings, part) * _work(part) * peers)
                continue
            _train(rate, images, record, part, options.device, progress)
            save()
    for rate in rates if "memory" in parts else ():
        for peer in settings["peers"]:
            progress.describe(f"memory, k={rate}, {peer}")
            case = {"growth_rate": rate, "peer": peer}
            if not has(record, "memory", case, lambda entry: "error" not in entry):
                _measure_memory(rate, peer, record, options)
                save()
            progress.advance(CHILD_WORK)


def _steps(settings: dict[str, Any], part: str) -> int:
    return int(settings["parity_steps" if part == "parity" else "steps"])


def _work(part: str) -> int:
    return FLOAT64_WORK if part == "parity" else 1


def _train(
    rate: int,
    images: Images,
    record: Record,
    part: str,
    device: torch.device,
    progress: Progress,
) -> None:
    """Train every peer, step by step in turn, and fill an entry of `record[part]` for each."""
    settings = record["settings"]
    parity = part == "parity"
    entries = {name: new_entry(growth_rate=rate, peer=name) for name in settings["peers"]}
    record[part].extend(entries.values())
    spec = spec_for(rate, settings)
    if parity:
        spec = replace(spec, batch_size=settings["parity_batch_size"])
    train(
        entries,
        spec,
        images,
        steps=_steps(settings, part),
        seed=settings["seed"],
        device=device,
        advance=lambda _: progress.advance(rate * _work(part)),
        dtype=torch.float64 if parity else torch.float32,
        test_images=settings["parity_test_images"] if parity else None,
    )


def _measure_memory(rate: int, peer: str, record: Record, options: Options) -> None:
    settings = record["settings"]
    case = MemoryCase(
        spec_for(rate, settings),
        peer,
        torch.get_num_threads(),
        str(options.device),
        settings["seed"],
    )
    figures = figures_in_child(case)
    record["memory"].append({"growth_rate": rate, "peer": peer, **figures})
