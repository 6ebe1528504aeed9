"""What the entries of a checkpoint must be: their types and ranges, in one place."""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from densenet_fast.train.architecture import MODELS, MOST_GROWTH, MOST_LAYERS
from densenet_fast.train.errors import UsageError

MOST_PIXELS = 2**16  # of an image's edge
MOST = 2**63 - 1  # as tensors hold whole numbers
MULTICLASS, MULTILABEL = "multiclass", "multilabel"  # tasks, by torchmetrics' names
# Figures of an epoch's training and of validation.
FIGURES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    MULTICLASS: (("loss", "top1"), ("loss", "top1", "top5")),
    MULTILABEL: (("loss",), ("loss", "auroc")),
}
# The share of the averaged weights that is still their first ones.
EMA_START = "ema_start"
# What the table has besides; earlier checkpoints have it as well.
MACHINE_ROW = ("images_per_second", "peak_memory_mib", "seconds")

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


def row_of(task: str, *, averaged: bool) -> tuple[str, ...]:
    """The names in an epoch's row: what the training alone decides, not the machine."""
    training, validation = FIGURES[task]
    names = ("epoch", "lr", *(f"train_{name}" for name in training))
    names += tuple(f"val_{name}" for name in validation)
    if not averaged:
        return names
    return (*names, *(f"ema_val_{name}" for name in validation), EMA_START)


Check = Callable[[Any, str], None]  # raises UsageError; takes a value and what it is called


def _refuse(name: str, expected: str, value: Any) -> NoReturn:
    raise UsageError(f"{name}: expected {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a tensor {list(value.shape)} of {kind}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def whole(least: int, most: int = MOST) -> Check:
    """Whole numbers from `least` to `most`."""

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(name, f"a whole number from {least} to {most}", value)

    return check


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """Numbers from `low` to `high`; any at all without them."""

    def check(value: Any, name: str) -> None:
        bounded = (low, high) != (-math.inf, math.inf)
        if type(value) not in (int, float) or (bounded and not low <= value <= high):
            _refuse(name, f"a number from {low:g} to {high:g}" if bounded else "a number", value)

    return check


def anything(value: Any, name: str) -> None:
    """What this run has of its own, and reads from no checkpoint."""


def text(value: Any, name: str) -> None:
    """Text."""
    if type(value) is not str:
        _refuse(name, "text", value)


def one_of(*choices: str) -> Check:
    """One of some texts."""

    def check(value: Any, name: str) -> None:
        if value not in choices or type(value) is not str:
            _refuse(name, f"one of {', '.join(choices)}", value)

    return check


def plain(value: Any, name: str) -> None:
    """What a flag of the command line can be."""
    if type(value) not in (bool, int, float, str, type(None)):
        _refuse(name, "a number, text or None", value)


def tensor(value: Any, name: str) -> None:
    """A tensor with values on the CPU."""
    if (
        not isinstance(value, Tensor)
        or value.device.type != "cpu"
        or value.layout != torch.strided
        or value.is_quantized
    ):
        _refuse(name, "a dense tensor", value)


def accepted(take: Callable[[Any], Any], what: str) -> Check:
    """What a generator takes for its state."""

    def check(value: Any, name: str) -> None:
        try:
            take(value)
        except (LookupError, OverflowError, RuntimeError, TypeError, ValueError):
            _refuse(name, what, value)

    return check


def optional(inner: Check) -> Check:
    """None, or what `inner` accepts."""

    def check(value: Any, name: str) -> None:
        if value is not None:
            inner(value, name)

    return check


def rows(inner: Check, least: int = 0) -> Check:
    """A list or tuple of at least so many."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            _refuse(name, f"a list of at least {least}", value)
        for at, part in enumerate(value):
            inner(part, f"{name}[{at}]")

    return check


def mapping(inner: Check, key: type = str) -> Check:
    """A dictionary, whatever its keys are called."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict) or any(type(found) is not key for found in value):
            _refuse(name, f"a dictionary with keys of type {key.__name__}", value)
        for found, part in value.items():
            inner(part, f"{name}[{found!r}]")

    return check


def record(needed: Mapping[str, Check], allowed: Mapping[str, Check] | None = None) -> Check:
    """A dictionary with these keys, and none beyond the allowed ones."""
    known = {**needed, **(allowed or {})}

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict) or not needed.keys() <= value.keys() <= known.keys():
            found = list(value) if isinstance(value, dict) else value
            _refuse(name, f"a dictionary with {', '.join(needed)}", found)
        for key, part in value.items():
            known[key](part, f"{name}[{key!r}]")

    return check


_ABOVE_ZERO = 1e-30
_TENSORS = mapping(tensor)
_PREPROCESSING = record(
    {
        "resize": optional(whole(1, MOST_PIXELS)),
        "crop": whole(1, MOST_PIXELS),
        "mean": rows(real(-1e30, 1e30), 1),
        "std": rows(real(_ABOVE_ZERO, 1e30), 1),
        "interpolation": one_of(*INTERPOLATIONS),
    }
)
_OWN = {
    "meters": mapping(_TENSORS),
    "rng": accepted(lambda s: torch.Generator().set_state(s), "a state of PyTorch's generator"),
    "python_rng": accepted(lambda s: random.Random().setstate(s), "a state of Python's generator"),
    "cuda_rng": optional(tensor),
}
_SCALER = {
    "scale": real(_ABOVE_ZERO, 1e30),
    "growth_factor": real(1, 1e30),
    "backoff_factor": real(_ABOVE_ZERO, 1),
    "growth_interval": whole(1),
    "_growth_tracker": whole(0),
}

# What every checkpoint has, and what going on with the training needs besides.
NEEDED: Mapping[str, Check] = {
    "architecture": record(
        {
            "model": one_of(*MODELS),
            "num_classes": whole(1, 2**31 - 1),
            "in_channels": whole(1, 2**31 - 1),
            "drop_rate": real(0, 1),
            "depth": optional(whole(1, MOST_LAYERS)),
            "growth_rate": optional(whole(1, MOST_GROWTH)),
        }
    ),
    "arguments": mapping(plain),
    "classes": rows(text, 1),
    "ema": optional(_TENSORS),
    "model": _TENSORS,
    "preprocessing": _PREPROCESSING,
    "task": one_of(*FIGURES),
}
TRAINING: Mapping[str, Check] = {
    "at": whole(0),
    "by_process": rows(record(_OWN), 1),
    "data": record(
        {"train": whole(0), "val": whole(0), "digest": text, "preprocessing": _PREPROCESSING}
    ),
    "ema_updates": optional(whole(0)),
    "epoch": whole(0),
    "history": rows(
        record(
            dict.fromkeys(("epoch", "lr"), real()),
            {n: real() for t in FIGURES for n in (*row_of(t, averaged=True), *MACHINE_ROW)},
        )
    ),
    "optimizer": record(
        {
            "state": mapping(mapping(optional(tensor)), int),
            "param_groups": rows(mapping(anything), 1),
        }
    ),
    "processes": whole(1),
    "scaler": record({}, _SCALER),
    "steps": whole(0),
    "threads": whole(1),
}


def check_tensors(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names, sizes or types.

    Raises:
        UsageError: some tensor is missing, or is none of the expected ones.
    """
    if different := sorted(expected.keys() ^ found.keys()):
        what = "is missing" if different[0] in expected else "is not of this network"
        more = "" if len(different) == 1 else f", and {len(different) - 1} more do not fit"
        raise UsageError(f"{name}: {different[0]} {what}{more}")
    for key, like in expected.items():
        if (found[key].shape, found[key].dtype) != (like.shape, like.dtype):
            _refuse(f"{name}[{key!r}]", shown(like), found[key])
