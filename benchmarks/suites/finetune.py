"""Fine-tuning: a DenseNet-121 trained on half of the classes gets a new classifier for the others.

The known recipe (PyTorch's transfer learning tutorial: all layers trained by SGD with momentum) on
torchvision's network, the same after `densenet_fast.convert`, and densenet_fast's own with the
weights from torchvision's file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks import datasets
from benchmarks.datasets import Images
from benchmarks.networks import NETWORKS
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.report import Column, Record, Row, Table, at, four_digits, percent, plain, typical
from benchmarks.suites import Advance, Options, Suite, Task
from benchmarks.suites.step import PEAK, memory_task
from benchmarks.train import FINE_TUNING, LEARNING_RATE, train, trained
from densenet_fast.train.errors import DataError
from densenet_fast.train.storage import write_atomically

FINE_TUNED = ("naive-channels-last", "ours-converted", "ours-bottleneck")
PRETRAINED_BY = "naive-channels-last"
WEIGHTS = "finetune-weights.pth"
HALF = 5  # classes
SPEC = replace(NETWORKS["densenet121"], num_classes=HALF, image_size=64, batch_size=32)
CHILD_WORK = 20.0  # of the progress bar, in training steps

COLUMNS = (
    Column("test accuracy", at("training", "test_accuracy"), percent),
    Column("test loss", at("training", "test_loss"), four_digits),
    Column("last ten losses", lambda row: fmean(row["training"]["losses"][-10:]), four_digits),
    Column("seconds a step", typical("training"), plain, ratio="speed"),
    PEAK,
)


class Finetune(Suite):
    """DenseNet-121 on digits, Fashion-MNIST or a folder."""

    title = "Fine-tuning: a new classifier on pretrained weights"
    options = frozenset({"parts", "rounds", "data"})
    parts = ("training", "memory")

    def plan(self, options: Options) -> Record:
        data, parts = options.data or "digits", list(options.parts or self.parts)
        images = datasets.load(data, options.seed)  # a fault of the files is said before the work
        halves = [part_of(images, later=later) for later in (False, True)]
        for half, classes in zip(halves, (f"0 to {HALF - 1}", f"{HALF} and above"), strict=True):
            if len(half.train_labels) < SPEC.batch_size or not len(half.test_labels):
                raise DataError(
                    f"{data!r} should have at least {SPEC.batch_size} training images and one test "
                    f"image with labels {classes}, got {len(half.train_labels)} and "
                    f"{len(half.test_labels)}"
                )
        return {
            "settings": {
                "data": data,
                "network": SPEC.title,
                "train_images": [len(half.train_labels) for half in halves],
                "test_images": [len(half.test_labels) for half in halves],
                "parts": parts,
                "steps": options.rounds_of((60, 200)),
                "learning_rate": LEARNING_RATE,
                "seed": options.seed,
            },
            "rows": [{"peer": name} for name in FINE_TUNED],
            "pretraining": [{"peer": PRETRAINED_BY}],
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        settings, rows = record["settings"], record["rows"]
        weights = options.output / WEIGHTS
        if "training" in settings["parts"]:
            for text, own, later in (
                ("training on the first classes", record["pretraining"], False),
                ("fine-tuning on the other classes", rows, True),
            ):
                done = all(trained(row) for row in own)
                done = done and (later or weights.is_file())
                call = partial(_train, own, weights, options, settings, later)
                yield Task(text, settings["steps"] * len(own), done, call)
        for row in rows if "memory" in settings["parts"] else ():
            yield memory_task(row, SPEC, options, settings, CHILD_WORK)

    def tables(self, record: Record) -> list[Table]:
        # The file's network has learnt other classes: it is compared with none.
        made = Table("The file's network, on its own classes", COLUMNS[:2], record["pretraining"])
        return [Table("", COLUMNS, record["rows"]), made]


def part_of(images: Images, *, later: bool) -> Images:
    """Images of the first five classes, or of the later ones under labels from zero."""

    def chosen(part: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mask = (labels >= HALF) == later
        return part[mask], labels[mask] - (HALF if later else 0)

    train_half = chosen(images.train_images, images.train_labels)
    return Images(*train_half, *chosen(images.test_images, images.test_labels))


def new_classifier(weights: Path, seed: int) -> dict[str, Tensor]:
    """The file's weights in densenet_fast's network, with a classifier as it is made."""
    from densenet_fast import load_weights

    state = initial_state(SPEC, seed + 1)
    model = build(PEERS["ours-bottleneck"], SPEC, state, device=torch.device("cpu"))
    load_weights(model, weights, ignore=("classifier.*",))
    loaded: dict[str, Tensor] = model.state_dict()
    return loaded | {key: state[key] for key in ("classifier.weight", "classifier.bias")}


def _train(
    rows: list[Row],
    weights: Path,
    options: Options,
    settings: dict[str, Any],
    later: bool,
    advance: Advance,
) -> None:
    """Make the file of pretrained weights, or fine-tune all implementations from it."""
    seed = settings["seed"]
    start: dict[str, Any] = {}
    if later:
        start = {"state": new_classifier(weights, seed), "recipe": FINE_TUNING}
    models = train(
        rows,
        "training",
        SPEC,
        part_of(datasets.load(settings["data"], seed), later=later),
        options.device,
        steps=settings["steps"],
        seed=seed,
        advance=lambda _: advance(1),
        **start,
    )
    if not later:
        buffer = io.BytesIO()
        torch.save(models[0].state_dict(), buffer)
        write_atomically(weights, buffer.getvalue())


SUITE = Finetune()
