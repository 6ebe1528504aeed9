"""`densenet-fast evaluate`: loss and accuracies of a trained network on validation images."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import torch

from densenet_fast.inference import optimize_for_inference
from densenet_fast.train import setup, trained
from densenet_fast.train.distributed import from_environment, together
from densenet_fast.train.errors import UsageError
from densenet_fast.train.loop import Placement, validate
from densenet_fast.train.networks import check_images
from densenet_fast.train.rules import device, one_of_checkpoint_and_weights
from densenet_fast.train.sources import Source

TIMEOUT = 600.0  # seconds that processes wait for each other


def run(arguments: Namespace) -> int:
    """Print the loss and the accuracies; returns the exit status.

    Raises:
        UsageError: no such network or data, or they do not fit each other.
    """
    one_of_checkpoint_and_weights(arguments)
    processes = from_environment()
    where = device(arguments.device, processes.local_rank)
    with together(processes, where, TIMEOUT):
        network = trained.load(arguments, where)
        setting = setup.open_data(arguments, processes, train=False)
        setting = replace(setting, plain=network.plain)
        source = setting.source
        _check_fit(network, source)
        check_images(network.model, 1, network.channels, network.plain.crop)
        loader = setup.validation_loader(setting, arguments.batch_size, processes, where)
        placement = Placement(where, torch.contiguous_format, None)
        model = optimize_for_inference(network.model)
        found = validate(model, loader, placement, len(network.classes))
        if processes.main:
            _report(arguments, source, found)
    return 0


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


def _report(arguments: Namespace, source: Source, found: dict[str, float]) -> None:
    images = len(source.val)
    if arguments.json:
        print(json.dumps({"images": images, "skipped": source.skipped, **found}))
        return
    print(
        f"{images} images: loss {found['loss']:.4f}, top-1 {found['top1']:.2f} %, "
        f"top-5 {found['top5']:.2f} %"
    )
