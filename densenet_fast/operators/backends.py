"""Which implementation of the operators runs: compiled CPU or CUDA kernels, or the reference.

Left alone ("auto"), each tensor gets the kernels of its device where they exist for its type, and
the reference twins in plain PyTorch elsewhere, with one warning for each reason. The choice can be
forced for the whole process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from densenet_fast.operators import cuda_device, extension

Backend = Literal["cpu", "cuda", "reference"]
Setting = Literal["auto", "cpu", "cuda", "reference"]
SETTINGS: tuple[Setting, ...] = ("auto", "cpu", "cuda", "reference")

_CPU_TYPES = (torch.bfloat16, torch.float32, torch.float64)
_CUDA_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Choice(NamedTuple):
    """A backend, and for the reference the reason why it is not a faster one."""

    backend: Backend
    reason: str | None


_setting: Setting = "auto"
# Answers of `select` under this setting.
_choices: dict[tuple[torch.device, torch.dtype], Backend] = {}
_warned: set[str] = set()


def backend_for(device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The best backend that exists for tensors of this device and type, whatever is forced."""
    device = torch.device(device)
    kind = device.type
    if kind == "cuda":
        return _cuda_backend(device, dtype)
    if kind == "cpu" and not extension.LOADED:
        return Choice("reference", extension.LOAD_ERROR)
    if kind == "cpu" and dtype not in _CPU_TYPES:
        return Choice(
            "reference",
            f"the CPU kernels compute in bfloat16, float32 and float64, not in {_name(dtype)}: "
            "convert model and input for the fast path",
        )
    if kind == "cpu":
        return Choice("cpu", None)
    return Choice(
        "reference",
        f"there are no kernels for {kind} tensors: the fast path runs on CPU and CUDA devices",
    )


def _cuda_backend(device: torch.device, dtype: torch.dtype) -> Choice:
    reason = cuda_device.obstacle(device.index)
    if reason is None and dtype not in _CUDA_TYPES:
        reason = (
            "the CUDA kernels compute in float16, bfloat16, float32 and float64, not in "
            f"{_name(dtype)}: convert model and input for the fast path"
        )
    return Choice("cuda", None) if reason is None else Choice("reference", reason)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select(tensor: Tensor) -> Backend:
    """The backend that runs operators on this tensor."""
    key = (tensor.device, tensor.dtype)
    if torch.compiler.is_compiling():
        return _choose(*key)  # else the graph would depend on what has been chosen before it
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _choose(*key)
    return chosen


def _choose(device: torch.device, dtype: torch.dtype) -> Backend:
    if _setting == "reference":
        return "reference"
    backend, reason = backend_for(device, dtype)
    if _setting not in ("auto", backend):
        raise RuntimeError(
            f"the backend {_setting!r} was forced, but {_name(dtype)} tensors on {device} cannot "
            f"use it: {reason or f'their backend is {backend!r}'}; expected tensors it supports, "
            'or densenet_fast.set_backend("auto")'
        )
    if reason is not None and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            "densenet_fast runs its reference implementation in plain PyTorch, which saves the "
            f"same memory but is slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return backend


def get_backend() -> Setting:
    """What is forced: "auto" for nothing."""
    return _setting


def set_backend(name: Setting) -> None:
    """Force a backend for the whole process; "auto" gives the choice back.

    Forcing "reference" also silences the warning about it. Forcing kernels makes tensors that they
    do not support an error instead of a slow step.
    """
    global _setting
    if name not in SETTINGS:
        raise ValueError(f"unknown backend: expected one of {', '.join(SETTINGS)}, got {name!r}")
    reason = {"cpu": extension.LOAD_ERROR, "cuda": extension.CUDA_ERROR}.get(name)
    if name == "cuda" and reason is None and not torch.cuda.is_available():
        reason = cuda_device.obstacle()
    if reason is not None:
        raise RuntimeError(f"the backend {name!r} does not exist here: {reason}")
    _setting = name
    _choices.clear()


@contextmanager
def use_backend(name: Setting) -> Iterator[None]:
    """Force a backend inside a `with` block.

    The choice is made anew by every operator call: a backward outside the block is not covered.
    """
    before = _setting
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)
