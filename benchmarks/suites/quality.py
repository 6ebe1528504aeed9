"""What the growth rate does to accuracy, and whether densenet_fast trains as well as naive does.

Growth: one network after the other, which differ in the growth rate alone. Parity: several
implementations of one network, trained from the same weights on the same batches, seed by seed;
rounding makes each training a different one, so they are compared by the spread between seeds.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import torch

from benchmarks import digits, fashion_mnist
from benchmarks.datasets import Images
from benchmarks.memory import MemoryCase, figures_in_child
from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.quality_page import figure, page
from benchmarks.train import LEARNING_RATE, Entry, new_entry, tested, train

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"growth_rates", "peers", "parts", "rounds", "data"})
PARTS = ("growth", "parity")
KNOWN_PEERS = BASIC_PEERS

GROWTH_RATES = (4, 8, 12, 16, 24, 32)
QUICK_GROWTH_RATES = (4, 8, 16, 32)
GROWTH_PEER = "ours-bottleneck"
PARITY_PEERS = ("naive-channels-last", "ours-bottleneck")
SEEDS = 3

DEPTH, QUICK_DEPTH = 40, 22
BATCH_SIZE, QUICK_BATCH_SIZE = 64, 16
PARITY_GROWTH_RATE, QUICK_PARITY_GROWTH_RATE = 12, 8
ROUNDS, QUICK_ROUNDS = 10, 3
LARGE_DATA_ROUNDS = 3  # of a data set with more training images than the next number
LARGE_DATA = 10_000
QUICK_ROUND_IMAGES = 3_200  # a pass over 60,000 is no quick one

# Work of the progress bar, in training steps times growth rate.
NAIVE_WORK = 2.0  # a step of another implementation than ours
TEST_WORK = 0.3  # a batch of test images, of a step
CHILD_WORK = 1_500.0


def load_images(data: str, seed: int) -> Images:
    """The images that `--data` names."""
    if data == "digits":
        return digits.load(seed=seed)
    return fashion_mnist.load(fashion_mnist.FOLDER if data == "fashion-mnist" else Path(data))


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    full, data = options.full, options.data or "digits"
    peers = options.peers or PARITY_PEERS
    if not any(PEERS[name].naive for name in peers):
        peers = (PARITY_PEERS[0], *peers)
    rates = options.growth_rates or (GROWTH_RATES if full else QUICK_GROWTH_RATES)
    parity_rate = PARITY_GROWTH_RATE if full else QUICK_PARITY_GROWTH_RATE
    images = load_images(data, options.seed)  # what is wrong with the files is said before the work
    count = len(images.train_labels)
    batch_size = min(count, BATCH_SIZE if full else QUICK_BATCH_SIZE)
    epoch = count // batch_size
    round_steps = epoch if full else min(epoch, QUICK_ROUND_IMAGES // batch_size)
    rounds = QUICK_ROUNDS
    if full:
        rounds = LARGE_DATA_ROUNDS if count > LARGE_DATA else ROUNDS
    rounds = options.rounds or rounds
    steps = rounds * round_steps
    return {
        "settings": {
            "data": data,
            "train_images": count,
            "test_images": len(images.test_labels),
            "depth": DEPTH if full else QUICK_DEPTH,
            "batch_size": batch_size,
            "growth_rates": list(rates),
            "parts": list(options.parts or PARTS),
            "rounds": rounds,
            "round_steps": round_steps,
            "epoch_steps": epoch,
            "steps": steps,
            "window": max(1, steps // 20),
            "growth_peer": GROWTH_PEER,
            # Growth rates that the user named hold for both parts.
            "parity_growth_rate": parity_rate if parity_rate in rates else rates[0],
            "parity_peers": list(peers),
            "seeds": [options.seed + i for i in range(SEEDS)],
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
        },
        "growth": [],
        "parity": [],
    }


def failures(record: Record) -> list[str]:
    """Cases that could not be measured, and losses that are no numbers any more."""
    found = []
    cases = [(f"k={entry['growth_rate']}", entry) for entry in record["growth"]]
    cases += [(f"seed {entry['seed']}, {entry['peer']}", entry) for entry in record["parity"]]
    for case, entry in cases:
        if "error" in entry.get("memory", {}):
            found.append(f"{case}: memory was not measured: {entry['memory']['error']}")
        for step, loss in enumerate(entry["losses"], start=1):
            if not isfinite(loss):
                found.append(f"{case}: the training loss is {loss} from step {step} on")
                break
        if not isfinite(entry.get("test_loss", 0.0)):
            found.append(f"{case}: the test loss is {entry['test_loss']}")
    return found


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Train network by network, then seed by seed."""
    settings = record["settings"]
    rates = settings["growth_rates"] if "growth" in settings["parts"] else ()
    seeds = settings["seeds"] if "parity" in settings["parts"] else ()
    peers, parity_rate = settings["parity_peers"], settings["parity_growth_rate"]
    work = sum(_work(GROWTH_PEER, rate, settings) + CHILD_WORK for rate in rates)
    work += sum(_work(name, parity_rate, settings) for name in peers) * len(seeds)
    progress.start(work)
    images = load_images(settings["data"], settings["seed"])
    for rate in rates:
        progress.describe(f"training, k={rate}")
        if has(record, "growth", {"growth_rate": rate}, _measured):
            progress.advance(_work(GROWTH_PEER, rate, settings) + CHILD_WORK)
            continue
        entry = new_entry(growth_rate=rate)
        record["growth"].append(entry)
        _train({GROWTH_PEER: entry}, rate, settings["seed"], images, settings, options, progress)
        save()
        progress.describe(f"memory of a step, k={rate}")
        entry["memory"] = _memory(rate, settings, options)
        progress.advance(CHILD_WORK)
        save()
    for seed in seeds:
        progress.describe(f"parity, seed {seed}")
        if has(record, "parity", {"seed": seed}, tested, count=len(peers)):
            progress.advance(sum(_work(name, parity_rate, settings) for name in peers))
            continue
        entries = {name: new_entry(seed=seed, peer=name) for name in peers}
        record["parity"].extend(entries.values())
        _train(entries, parity_rate, seed, images, settings, options, progress)
        save()


def _measured(entry: Entry) -> bool:
    return tested(entry) and "error" not in entry.get("memory", {"error": ""})


def _spec(rate: int, settings: dict[str, Any]) -> NetworkSpec:
    return densenet_bc(settings["depth"], rate, batch_size=settings["batch_size"], in_channels=1)


def _step_work(name: str, rate: int) -> float:
    return rate * (1.0 if PEERS[name].ours else NAIVE_WORK)


def _test_work(name: str, rate: int, settings: dict[str, Any]) -> float:
    return _step_work(name, rate) * TEST_WORK * settings["test_images"] / settings["batch_size"]


def _work(name: str, rate: int, settings: dict[str, Any]) -> float:
    """Work of training one implementation and testing it."""
    return _step_work(name, rate) * settings["steps"] + _test_work(name, rate, settings)


def _train(
    entries: dict[str, Entry],
    rate: int,
    seed: int,
    images: Images,
    settings: dict[str, Any],
    options: Options,
    progress: Progress,
) -> None:
    train(
        entries,
        _spec(rate, settings),
        images,
        steps=settings["steps"],
        seed=seed,
        device=options.device,
        advance=lambda name: progress.advance(_step_work(name, rate)),
    )
    progress.advance(sum(_test_work(name, rate, settings) for name in entries))


def _memory(rate: int, settings: dict[str, Any], options: Options) -> dict[str, Any]:
    return figures_in_child(
        MemoryCase(
            _spec(rate, settings),
            GROWTH_PEER,
            torch.get_num_threads(),
            str(options.device),
            settings["seed"],
        )
    )
