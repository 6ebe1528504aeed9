"""What flags mean together, filled in or refused before any work."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from densenet_fast.train.architecture import BC
from densenet_fast.train.errors import UsageError, flag
from densenet_fast.train.flag_types import LARGEST
from densenet_fast.train.optimization import lr_factor


class Dependent(NamedTuple):
    """A flag that is read under a condition alone: given without it, it would be ignored."""

    name: str
    default: Any
    condition: str
    holds: Callable[[Namespace], Any]


DEPENDENT = (
    Dependent("depth", 40, f"--model {BC}", lambda a: a.model == BC),
    Dependent("growth_rate", 12, f"--model {BC}", lambda a: a.model == BC),
    Dependent(
        "memory_budget", None, "--checkpoint-mode auto", lambda a: a.checkpoint_mode == "auto"
    ),
    Dependent("uncertain", "ignore", "--labels", lambda a: a.labels),
    Dependent("missing", "ignore", "--labels", lambda a: a.labels),
    Dependent("label_names", None, "--labels", lambda a: a.labels),
    Dependent("val_labels", None, "--labels", lambda a: a.labels),
    Dependent("group_column", None, "--labels", lambda a: a.labels),
    Dependent("amp_dtype", "bfloat16", "--amp", lambda a: a.amp),
    Dependent("momentum", 0.9, "--opt sgd, sgd_nesterov or rmsprop", lambda a: a.opt != "adamw"),
    Dependent("lr_step_size", 30, "--lr-scheduler steplr", lambda a: a.lr_scheduler == "steplr"),
    Dependent(
        "lr_gamma",
        0.1,
        "--lr-scheduler steplr or exponentiallr",
        lambda a: a.lr_scheduler != "cosineannealinglr",
    ),
    Dependent(
        "lr_min",
        0.0,
        "--lr-scheduler cosineannealinglr",
        lambda a: a.lr_scheduler == "cosineannealinglr",
    ),
    Dependent("lr_warmup_method", "constant", "--lr-warmup-epochs", lambda a: a.lr_warmup_epochs),
    Dependent("lr_warmup_decay", 0.01, "--lr-warmup-epochs", lambda a: a.lr_warmup_epochs),
    Dependent("model_ema_steps", 32, "--model-ema", lambda a: a.model_ema),
    Dependent("model_ema_decay", 0.99998, "--model-ema", lambda a: a.model_ema),
)


def complete(arguments: Namespace) -> None:
    """Fill in the defaults that depend on other flags of `train`.

    Raises:
        UsageError: flags do not go together.
    """
    for name, default, condition, holds in DEPENDENT:
        if holds(arguments):
            if getattr(arguments, name) is None:
                setattr(arguments, name, default)
        elif getattr(arguments, name) is not None:
            raise UsageError(f"{_given(arguments, name)} applies to {condition} alone")
    _complete_data(arguments)
    if arguments.checkpoint_mode == "auto" and arguments.memory_budget is None:
        raise UsageError("--checkpoint-mode auto needs --memory-budget, the MiB a step may take")
    if arguments.opt == "sgd_nesterov" and arguments.momentum == 0:
        raise UsageError("--opt sgd_nesterov needs a --momentum above 0, got 0")
    if arguments.lr_warmup_method == "linear" and arguments.lr_warmup_decay == 0:
        raise UsageError("--lr-warmup-decay must be above 0, or the first epoch would not train")
    if arguments.lr_min is not None and arguments.lr_min > arguments.lr:
        raise UsageError(f"--lr-min {arguments.lr_min} is above --lr {arguments.lr}")
    if arguments.lr_warmup_epochs >= arguments.epochs:
        raise UsageError(
            f"--lr-warmup-epochs {arguments.lr_warmup_epochs} must be below --epochs "
            f"{arguments.epochs}"
        )
    if not _last_rate(arguments) <= LARGEST:
        raise UsageError(
            f"--lr-gamma {arguments.lr_gamma} makes --lr {arguments.lr} larger than {LARGEST:g} "
            f"within --epochs {arguments.epochs}"
        )
    if arguments.resume is not None and arguments.overwrite:
        raise UsageError("--resume goes on with what --overwrite would begin anew: give one")


def _given(arguments: Namespace, name: str) -> str:
    value = getattr(arguments, name)
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}"


# What changes images, and what is of one class an image: neither is there where its flag is 0.
_MIXING = ("mixup_alpha", "cutmix_alpha")
_RANGES = ("scale", "ratio")
_AUGMENTING = (*_RANGES, "hflip", "vflip", "color_jitter", "auto_augment", "random_erase", *_MIXING)
_ONE_CLASS = (*_MIXING, "label_smoothing", "class_map")


def _complete_data(arguments: Namespace) -> None:
    for name in _AUGMENTING if arguments.no_aug else ():
        if getattr(arguments, name):
            given = _given(arguments, name)
            raise UsageError(f"{given} applies to training without --no-aug alone")
    for name in _RANGES:
        least, most = getattr(arguments, name) or (0, 0)
        if least > most:
            raise UsageError(f"{flag(name)}: {least} is above {most}")
    if arguments.labels is None:
        return
    for name in _ONE_CLASS:
        if getattr(arguments, name):
            given = _given(arguments, name)
            raise UsageError(f"{given} applies to one class an image, not to --labels")
    if (arguments.val_labels is None) == (arguments.val_split is None):
        raise UsageError(
            "--labels needs --val-labels CSV, or --val-split SHARE of its images, for validation"
        )
    names = arguments.label_names or []
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--label-names: {twice[0]!r} is given twice")


def _last_rate(arguments: Namespace) -> float:
    """The last epoch's rate: the largest one where rates grow."""
    try:
        return arguments.lr * lr_factor(arguments)(arguments.epochs - 1)
    except OverflowError:
        return math.inf


def one_of_checkpoint_and_weights(arguments: Namespace) -> None:
    """`evaluate` and `predict` use a checkpoint, or a network by its name with weights.

    Raises:
        UsageError: not exactly one of them is given.
    """
    if (arguments.checkpoint is None) == (arguments.weights is None):
        raise UsageError("expected --checkpoint FILE, or --model NAME with --weights NAME or FILE")
    if arguments.checkpoint is not None and arguments.model is not None:
        raise UsageError("--model applies to --weights alone: a checkpoint knows its network")
    if arguments.weights is not None:
        if arguments.no_ema:
            raise UsageError("--no-ema applies to --checkpoint alone")
        if arguments.model is None or arguments.model == BC:
            raise UsageError("--weights needs --model, one of ImageNet's: densenet121 and so on")


def device(text: str | None, local_rank: int = 0) -> torch.device:
    """The device that a command runs on; of several processes, each takes its own GPU.

    Raises:
        UsageError: there is no such device.
    """
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(text)
    except (RuntimeError, ValueError) as error:  # of names that are no UTF-8
        raise UsageError(f"unknown --device {text!r}: expected cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {text!r} is not supported: expected cpu, cuda or cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if found.index is None else found.index
        if index >= count:
            raise UsageError(f"--device cuda:{index} is not there: PyTorch sees {count} GPUs")
        found = torch.device("cuda", index)
    return found
