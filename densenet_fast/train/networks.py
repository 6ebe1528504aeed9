"""Networks by name, with weights, and what of them trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import densenet_fast
from densenet_fast.memory import DoesNotFitError, estimate
from densenet_fast.modules import input_checks
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train.architecture import BC, Architecture
from densenet_fast.train.checkpoints import chosen, is_checkpoint, read
from densenet_fast.train.errors import UsageError, lack_of_memory

SHOWN = 12  # lines of an error, which may name every tensor
NEW = "classifier.*"  # what stays as it is where weights from a file do not fit
# What making a network with weights raises for weights that are not there, or another network's.
ERRORS = (ImportError, OSError, RuntimeError, TypeError, ValueError)
HEAD = ("features", "all-but-classifier")  # of --freeze: all but the classifier


def pretrained(architecture: Architecture, weights: str, *, exact: bool) -> EfficientDenseNet:
    """The network with weights of a name or from a file.

    Args:
        architecture: what to build.
        weights: a name that `densenet_fast.densenet121(weights=...)` knows, or a file.
        exact: refuse weights for another number of classes; else the classifier is new then.

    Raises:
        UsageError: there are no such weights, or they are another network's.
    """
    if Path(weights).is_file():
        return _from_file(architecture, Path(weights), exact=exact)
    if architecture.model == BC or Path(weights).suffix or Path(weights).name != weights:
        raise UsageError(f"--weights {weights}: no such file")
    builder: Callable[..., EfficientDenseNet] = getattr(densenet_fast, architecture.model)
    try:
        model = builder(weights=weights, drop_rate=architecture.drop_rate)
    except ERRORS as error:
        if lack_of_memory(error):
            raise
        raise UsageError(f"--weights {weights} for {architecture.model}: {error}") from error
    stem = next(module for module in model.features if isinstance(module, nn.Conv2d))
    if stem.in_channels != architecture.in_channels:
        raise UsageError(
            f"--weights {weights} are for images of {stem.in_channels} channels, the data have "
            f"{architecture.in_channels}; --in-chans {stem.in_channels} converts them"
        )
    if model.classifier.out_features != architecture.num_classes:
        if exact:
            raise UsageError(
                f"--weights {weights} are for {model.classifier.out_features} classes, expected "
                f"{architecture.num_classes}"
            )
        model.classifier = nn.Linear(model.classifier.in_features, architecture.num_classes)
    return model


def _from_file(architecture: Architecture, path: Path, *, exact: bool) -> EfficientDenseNet:
    choice: dict[str, Any] = {} if exact else {"ignore": NEW}
    if is_checkpoint(path):  # ours: averaged weights where it has them
        choice["entry"] = chosen(read(path))
    model = architecture.build()
    try:
        densenet_fast.load_weights(model, path, **choice)
    except ERRORS as error:
        if lack_of_memory(error):
            raise
        lines = str(error).splitlines()
        rest = [f"  ... and {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
        text = "\n".join([*lines[:SHOWN], *rest])
        raise UsageError(f"--weights {path}: {text}") from error
    return model


def freeze(model: EfficientDenseNet, prefix: str) -> int:
    """Let parameters below a module be as they are; returns how many values still train.

    Raises:
        UsageError: no module has that name, or nothing is left to train.
    """
    name = "features" if prefix in HEAD else prefix
    modules = dict(model.named_modules())
    frozen = [
        p for n, m in modules.items() if f"{n}.".startswith(f"{name}.") for p in m.parameters()
    ]
    if name == "" or not frozen:
        known = ", ".join((*HEAD, *(f"features.{n}" for n, _ in model.features.named_children())))
        raise UsageError(f"--freeze {prefix!r}: no parameters there; there are {known}, and so on")
    for parameter in frozen:
        parameter.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UsageError(f"--freeze {prefix!r} leaves nothing to train")
    return trained


def check_images(model: EfficientDenseNet, batch: int, channels: int, size: int) -> None:
    """Refuse batches that the network would refuse in training, before anything is computed.

    Raises:
        UsageError: images too small for its pooling, or a batch norm would see a single value.
    """
    images = torch.empty((batch, channels, size, size), device="meta")
    try:
        input_checks.chain("the network", model.features, images)
    except ValueError as error:
        raise UsageError(f"images of {size}×{size}, {batch} at a time: {error}") from error


def set_memory(model: EfficientDenseNet, mode: str, budget: float | None) -> None:
    """Choose what blocks keep for the backward; `budget` in MiB for mode "auto"."""
    if budget is not None:
        model.memory_budget = int(budget * 2**20)
    setattr(model, "checkpoint", mode)  # noqa: B010  (the argument parser knows the modes)


def check_memory(model: EfficientDenseNet, shape: tuple[int, ...], amp: torch.dtype | None) -> None:
    """Refuse a budget that no step of these images [N, C, H, W] keeps to.

    Raises:
        UsageError: it does not fit, or some part of the network does not run fused.
    """
    if model.checkpoint != "auto":
        return
    try:
        estimate(model, shape, amp)
    except DoesNotFitError as error:
        raise UsageError(f"--memory-budget: {error}") from error
    except RuntimeError as error:
        raise UsageError(f"--checkpoint-mode auto: {error}") from error


def synchronized(model: EfficientDenseNet, device: torch.device) -> EfficientDenseNet:
    """The network with batch statistics of all processes.

    Raises:
        UsageError: on the CPU, where some batch norm would run as PyTorch's, for GPUs alone.
    """
    converted: EfficientDenseNet = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu":
        plain = [row for row in densenet_fast.fusion_report(converted) if not row.fused]
        if plain:
            raise UsageError(
                "--sync-bn needs GPUs here: PyTorch's SyncBatchNorm knows no CPU, and "
                f"{plain[0].name} does not run fused ({plain[0].reason})"
            )
    return converted
