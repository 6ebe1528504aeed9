"""Fine-tuning: a DenseNet-121 trained on half of the classes gets a new classifier for the others.

The known recipe (PyTorch's transfer learning tutorial: all layers trained by SGD with momentum) on
torchvision's network, the same after `densenet_fast.convert`, and densenet_fast's own with the
weights from torchvision's file.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import DataError, Images
from benchmarks.memory import MemoryCase, figures_in_child
from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.finetune_page import figure, page
from benchmarks.suites.quality import load_images
from benchmarks.train import FINE_TUNING, LEARNING_RATE, Entry, new_entry, tested, train
from densenet_fast.train.storage import write_atomically

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"parts", "rounds", "data"})
PARTS = ("training", "memory")
FINE_TUNED = ("naive-channels-last", "ours-converted", "ours-bottleneck")
# The network that makes the file, and what the file is called.
PRETRAINED_BY = "naive-channels-last"
WEIGHTS = "finetune-weights.pth"

HALF = 5  # classes
IMAGE_SIZE = 64  # pixels
BATCH_SIZE = 32
QUICK_STEPS, FULL_STEPS = 60, 200
CHILD_WORK = 20.0  # of the progress bar, in training steps


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    data = options.data or "digits"
    images = load_images(data, options.seed)  # what is wrong with the files is said before the work
    halves = [part_of(images, later=later) for later in (False, True)]
    for half, classes in zip(halves, (f"0 to {HALF - 1}", f"{HALF} and above"), strict=True):
        if len(half.train_labels) < BATCH_SIZE or not len(half.test_labels):
            raise DataError(
                f"{data!r} should have at least {BATCH_SIZE} training images and one test image "
                f"with labels {classes}, got {len(half.train_labels)} and {len(half.test_labels)}"
            )
    return {
        "settings": {
            "data": data,
            "network": _spec().to_json(),
            "train_images": [len(half.train_labels) for half in halves],
            "test_images": [len(half.test_labels) for half in halves],
            "peers": list(FINE_TUNED),
            "parts": list(options.parts or PARTS),
            "steps": options.rounds or (FULL_STEPS if options.full else QUICK_STEPS),
            "learning_rate": LEARNING_RATE,
            "seed": options.seed,
        },
        "pretraining": [],
        "training": [],
        "memory": [],
    }


def part_of(images: Images, *, later: bool) -> Images:
    """Images of the first five classes, or of the later ones under labels from zero."""

    def chosen(part: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mask = (labels >= HALF) == later
        return part[mask], labels[mask] - (HALF if later else 0)

    train_half = chosen(images.train_images, images.train_labels)
    return Images(*train_half, *chosen(images.test_images, images.test_labels))


def _spec(classes: int = HALF) -> NetworkSpec:
    shape: dict[str, Any] = {"image_size": IMAGE_SIZE, "batch_size": BATCH_SIZE}
    return replace(NETWORKS["densenet121"], num_classes=classes, **shape)


def failures(record: Record) -> list[str]:
    """Cases whose memory could not be measured."""
    return [f"{e['peer']}: {e['error']}" for e in record["memory"] if "error" in e]


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Train the file's network, fine-tune all others side by side, measure memory."""
    settings = record["settings"]
    peers, parts, steps = settings["peers"], settings["parts"], settings["steps"]
    progress.start(
        steps * (1 + len(peers)) * ("training" in parts)
        + CHILD_WORK * len(peers) * ("memory" in parts)
    )
    if "training" in parts:
        images = load_images(settings["data"], settings["seed"])
        weights = options.output / WEIGHTS
        progress.describe("training on the first classes")
        if has(record, "pretraining", {}, tested) and weights.is_file():
            progress.advance(steps)
        else:
            _pretrain(weights, part_of(images, later=False), record, options, progress)
            save()
        progress.describe("fine-tuning on the other classes")
        if has(record, "training", {}, tested, count=len(peers)):
            progress.advance(steps * len(peers))
        else:
            _fine_tune(weights, part_of(images, later=True), record, options, progress)
            save()
    for peer in peers if "memory" in parts else ():
        progress.describe(f"memory, {peer}")
        if not has(record, "memory", {"peer": peer}, lambda entry: "error" not in entry):
            threads, device = torch.get_num_threads(), str(options.device)
            case = MemoryCase(_spec(), peer, threads, device, settings["seed"])
            record["memory"].append({"peer": peer, **figures_in_child(case)})
            save()
        progress.advance(CHILD_WORK)


def _pretrain(
    weights: Path, images: Images, record: Record, options: Options, progress: Progress
) -> None:
    """Make the file of pretrained weights with torchvision's network."""
    settings = record["settings"]
    entry = new_entry(peer=PRETRAINED_BY)
    record["pretraining"] = [entry]
    models = _train({PRETRAINED_BY: entry}, images, settings, options, progress)
    buffer = io.BytesIO()
    torch.save(models[PRETRAINED_BY].state_dict(), buffer)
    write_atomically(weights, buffer.getvalue())


def new_classifier(weights: Path, seed: int) -> dict[str, Tensor]:
    """The file's weights in densenet_fast's network, with a classifier as it is made."""
    from densenet_fast import load_weights

    spec, state = _spec(), initial_state(_spec(), seed + 1)
    model = build(PEERS["ours-bottleneck"], spec, state, device=torch.device("cpu"))
    load_weights(model, weights, ignore=("classifier.*",))
    loaded: dict[str, Tensor] = model.state_dict()
    for key in ("classifier.weight", "classifier.bias"):
        loaded[key] = state[key]
    return loaded


def _fine_tune(
    weights: Path, images: Images, record: Record, options: Options, progress: Progress
) -> None:
    settings = record["settings"]
    entries = {name: new_entry(peer=name) for name in settings["peers"]}
    record["training"] = list(entries.values())
    state = new_classifier(weights, settings["seed"])
    _train(entries, images, settings, options, progress, state=state, recipe=FINE_TUNING)


def _train(
    entries: dict[str, Entry],
    images: Images,
    settings: dict[str, Any],
    options: Options,
    progress: Progress,
    **start: Any,
) -> dict[str, nn.Module]:
    """Train the peers of `entries` side by side; `start` goes on to `benchmarks.train.train`."""
    return train(
        entries,
        _spec(),
        images,
        steps=settings["steps"],
        seed=settings["seed"],
        device=options.device,
        advance=lambda name: progress.advance(1),
        **start,
    )
