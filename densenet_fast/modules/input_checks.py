"""Inputs are refused here, in plain words, before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.blocks.synchronized import group_of
from densenet_fast.modules.eligibility import NORMS, is_norm, touched


def images(owner: str, input: Any) -> None:
    """A floating-point tensor [N, C, H, W] without empty dimensions."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{owner} expects a tensor [N, C, H, W], got {type(input).__name__}")
    if input.dim() != 4:
        raise ValueError(
            f"{owner} expects a 4-D input [N, C, H, W], got {input.dim()}-D {tuple(input.shape)}"
        )
    if not input.is_floating_point() and not input.is_quantized:
        raise TypeError(
            f"{owner} expects a floating-point input, got {input.dtype}: convert it first, "
            "for example with input.float()"
        )
    n, c, h, w = input.shape
    if n == 0:
        raise ValueError(f"{owner} got an empty batch: {tuple(input.shape)}")
    if h == 0 or w == 0 or c == 0:
        raise ValueError(f"{owner} got images without any pixel: {tuple(input.shape)}")


def channels(owner: str, input: Tensor, first: nn.Module | None) -> None:
    """The input has as many channels as `first`, the module that will read it, expects."""
    if first is None or touched(first):
        return
    if is_norm(first):
        expected = first.num_features
    elif type(first) is nn.Conv2d:
        expected = first.in_channels
    else:
        return
    if input.shape[1] != expected:
        raise ValueError(
            f"{owner} expects {expected} input channels, got {input.shape[1]}: {tuple(input.shape)}"
        )


_CHECKED = (nn.Conv2d, *NORMS, nn.Linear)
_CONTAINERS = (nn.Sequential, nn.ModuleDict, nn.ModuleList)
_REDUCED = (torch.float16, torch.bfloat16)


def parameters(owner: nn.Module, module: nn.Module, input: Tensor) -> None:
    """Every tensor below `module`, a part of `owner`, fits the input's device and dtype.

    Modules of other types, and hooked ones, are left out with all they contain: they may convert
    or move tensors themselves.
    """
    if input.is_quantized or not input.is_floating_point():
        return
    device = input.device.type
    any_dtype = device != "meta" and torch.is_autocast_enabled(device)
    _parameters(owner, module, input, any_dtype)


def _parameters(owner: nn.Module, module: nn.Module, input: Tensor, any_dtype: bool) -> None:
    if type(module) in _CHECKED:
        if not touched(module):
            _tensors(owner, module, input, any_dtype)
    elif type(module).__module__.startswith("densenet_fast.") or type(module) in _CONTAINERS:
        for child in module.children():
            if not touched(child):
                _parameters(owner, child, input, any_dtype)


def _tensors(owner: nn.Module, module: nn.Module, input: Tensor, any_dtype: bool) -> None:
    norm = is_norm(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        # Not the tensor's method: some subclasses have none (per-sample gradients).
        if tensor is None or not tensor.dtype.is_floating_point:
            continue
        if tensor.device != input.device:
            raise ValueError(
                f"{type(owner).__name__}: the input is on {input.device}, but "
                f"{_path(owner, module)}{name} is on {tensor.device}; move one of them with .to()"
            )
        mixed_norm = norm and tensor.dtype == torch.float32 and input.dtype in _REDUCED
        if tensor.dtype != input.dtype and not any_dtype and not mixed_norm:
            raise TypeError(
                f"{type(owner).__name__}: the input is {input.dtype}, but "
                f"{_path(owner, module)}{name} is {tensor.dtype}; convert one of them with .to()"
            )


def _path(owner: nn.Module, part: nn.Module) -> str:
    names = [name for name, module in owner.named_modules() if module is part]
    return f"{names[0]}." if names and names[0] else ""


def values_per_channel(module: nn.Module, n: int, h: int, w: int) -> None:
    """BatchNorm's own error, if a norm below `module` would take statistics of a single value."""
    if n * h * w != 1:
        return
    for norm in module.modules():
        if not is_norm(norm) or not (norm.training or norm.running_mean is None):
            continue
        if not group_of(norm):
            size = torch.Size([n, norm.num_features, h, w])
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {size}"
            )
