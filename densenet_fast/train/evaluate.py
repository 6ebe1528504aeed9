"""`densenet-fast evaluate`: how good a trained network is on validation images, by class too."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import torch

from densenet_fast.inference import optimize_for_inference
from densenet_fast.reports import table
from densenet_fast.train import data, trained
from densenet_fast.train.distributed import from_environment, together
from densenet_fast.train.entries import MULTILABEL
from densenet_fast.train.errors import UsageError, flag
from densenet_fast.train.labels import MEANING
from densenet_fast.train.loop import Placement, validate
from densenet_fast.train.networks import check_images
from densenet_fast.train.rules import device, one_of_checkpoint_and_weights
from densenet_fast.train.sources import Source
from densenet_fast.train.tasks import Figures, Task

TIMEOUT = 600.0  # seconds that processes wait for each other


def run(arguments: Namespace) -> int:
    """Print the figures of all images and of each class; returns the exit status.

    Raises:
        UsageError: no such network or data, or they do not fit each other.
    """
    one_of_checkpoint_and_weights(arguments)
    processes = from_environment()
    where = device(arguments.device, processes.local_rank)
    with together(processes, where, TIMEOUT):
        network = trained.load(arguments, where)
        expected = _like_training(arguments, network)
        setting = data.open_data(arguments, processes, train=False, expected=expected)
        setting = replace(setting, plain=network.plain)
        source = setting.source
        _check_fit(network, source)
        check_images(network.model, 1, network.channels, network.plain.crop)
        loader = data.validation_loader(setting, arguments.batch_size, processes, where)
        placement = Placement(where, torch.contiguous_format, None)
        model = optimize_for_inference(network.model)
        found = validate(model, loader, placement, network.task)
        if processes.main:
            _report(arguments, source, network.task, found)
    return 0


def _like_training(arguments: Namespace, network: trained.Trained) -> data.Expected:
    """Labels that are not known are read as in training, unless flags say otherwise."""
    labels = arguments.labels is not None
    if labels != (network.task.name == MULTILABEL):
        raise UsageError(
            "--labels is needed: the network answers with several labels"
            if arguments.labels is None
            else f"--labels {arguments.labels}: the network answers with one class of several"
        )
    for name in ("uncertain", "missing"):
        given = getattr(arguments, name)
        if given is not None and not labels:
            raise UsageError(f"{flag(name)} {given} applies to --labels alone")
        before = network.arguments.get(name)
        setattr(arguments, name, given or (before if before in MEANING else "ignore"))
    if labels and arguments.class_map is not None:
        raise UsageError("--class-map applies to folders of classes alone")
    return data.Expected(
        network.channels,
        network.classes if labels else None,
        others=network.arguments.get("label_names") is not None,
    )


def _check_fit(network: trained.Trained, source: Source) -> None:
    if source.channels != network.channels:
        raise UsageError(
            f"{source.name} has images of {source.channels} channels, the network expects "
            f"{network.channels}"
        )
    if len(source.classes) != len(network.classes):
        raise UsageError(
            f"{source.name} has {len(source.classes)} classes, the network {len(network.classes)}"
        )
    if network.of_data and source.classes != network.classes:
        pairs = zip(source.classes, network.classes, strict=True)
        found, expected = next((ours, theirs) for ours, theirs in pairs if ours != theirs)
        raise UsageError(
            f"{source.name} has other classes than the network: {found!r} where it has {expected!r}"
        )


def _report(arguments: Namespace, source: Source, task: Task, found: Figures) -> None:
    images = len(source.val)
    rows = [
        {"class": name, **figures}
        for name, figures in zip(source.classes, found.by_class, strict=True)
    ]
    if arguments.json:
        # JSON has no nan.
        classes = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        facts = {"images": images, "skipped": source.skipped, **found.whole, "classes": classes}
        print(json.dumps(facts))
        return
    cells = [[_shown(value) for value in row.values()] for row in rows]
    print("\n".join(table([list(rows[0]), *cells], left=1)))
    print(f"{images} images: {task.describe(found.whole)}")


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
