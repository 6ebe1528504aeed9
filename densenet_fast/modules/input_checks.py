"""Inputs are refused here, in plain words, before anything is computed; and what size they get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.blocks.specs import SHAPES
from densenet_fast.blocks.stem_convolution import Size, windows
from densenet_fast.blocks.synchronized import group_of
from densenet_fast.modules.dimensions import (
    AVERAGES,
    BATCH_NORMS,
    CONVS,
    DROPOUTS,
    INSTANCE_NORMS,
    MAXIMA,
    NORMS,
    OF_TYPE,
    TRANSPOSED,
)
from densenet_fast.modules.eligibility import (
    KINDS,
    channels_of,
    is_norm,
    setting,
    takes_statistics,
    touched,
)
from densenet_fast.modules.layer_parts import READERS


def dimensions(owner: nn.Module) -> int | None:
    """How many dimensions the images of a network or block have: the first convolution or norm.

    None where others' modules alone, which may be of any kind, would say so.
    """
    if KINDS.get(type(owner)) == "chain":  # of convolutions and norms of one kind
        return next((OF_TYPE[type(m)] for m in owner.modules() if type(m) in OF_TYPE), None)
    for module in owner._modules.values():
        kind: Any = type(module)
        found = OF_TYPE.get(kind)
        if found is None and module is not None:
            if kind in _CONTAINERS or kind in KINDS or kind in READERS:
                found = dimensions(module)
        if found is not None:
            return found
    return None


def images(owner: nn.Module, input: Any) -> None:
    """A floating-point tensor of the owner's dimensions, none of them empty."""
    name, dims = type(owner).__name__, dimensions(owner)
    shapes = [*SHAPES.values()] if dims is None else [SHAPES[dims]]
    if not isinstance(input, Tensor):
        expected = " or ".join(shapes)
        raise TypeError(f"{name} expects a tensor {expected}, got {type(input).__name__}")
    if input.dim() - 2 not in ((dims,) if dims else SHAPES):
        expected = " or ".join(f"{shape.count(',') + 1}-D input {shape}" for shape in shapes)
        raise ValueError(f"{name} expects a {expected}, got {input.dim()}-D {tuple(input.shape)}")
    if not input.is_floating_point() and not input.is_quantized:
        raise TypeError(
            f"{name} expects a floating-point input, got {input.dtype}: convert it first, "
            "for example with input.float()"
        )
    if input.shape[0] == 0:
        raise ValueError(f"{name} got an empty batch: {tuple(input.shape)}")
    if 0 in input.shape:
        raise ValueError(f"{name} got images without any pixel: {tuple(input.shape)}")


def channels(owner: str, input: Tensor, first: nn.Module | None) -> None:
    """The input has as many channels as `first`, the module that will read it, expects."""
    if first is None or touched(first):
        return
    if is_norm(first):
        expected = channels_of(first)
    elif isinstance(first, CONVS) and type(first) in CONVS:
        expected = first.in_channels
    else:
        return
    if input.shape[1] != expected:
        raise ValueError(
            f"{owner} expects {expected} input channels, got {input.shape[1]}: {tuple(input.shape)}"
        )


_CHECKED = (*CONVS, *TRANSPOSED, *NORMS, nn.Linear)
_CONTAINERS = (nn.Sequential, nn.ModuleDict, nn.ModuleList)
_REDUCED = (torch.float16, torch.bfloat16)
_KEEP_SIZE = (
    *BATCH_NORMS,
    nn.GroupNorm,
    *INSTANCE_NORMS,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
    nn.Dropout,
    *DROPOUTS,
)
# A search for the smallest image gives up here: some module takes no image that is reasonable.
_LARGEST_SEARCHED = 4096


def parameters(owner: nn.Module, module: nn.Module, input: Tensor) -> None:
    """Every tensor below `module`, a part of `owner`, fits the input's device and dtype.

    Modules of other types, and hooked ones, are left out with all they contain: they may convert
    or move tensors themselves.
    """
    if not input.is_floating_point():
        return
    device = input.device.type
    any_dtype = device != "meta" and torch.is_autocast_enabled(device)
    for part in _checked(module):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            # Not the tensor's method: some subclasses have none (per-sample gradients).
            if tensor is None or not tensor.dtype.is_floating_point:
                continue
            mixed = is_norm(part) and tensor.dtype == torch.float32 and input.dtype in _REDUCED
            if tensor.device != input.device:
                raise ValueError(
                    f"{type(owner).__name__}: the input is on {input.device}, but "
                    f"{_path(owner, part)}{name} is on {tensor.device}; move one of them with .to()"
                )
            if tensor.dtype != input.dtype and not any_dtype and not mixed:
                raise TypeError(
                    f"{type(owner).__name__}: the input is {input.dtype}, but "
                    f"{_path(owner, part)}{name} is {tensor.dtype}; convert one of them with .to()"
                )


def _checked(module: nn.Module, *, known: bool = False) -> list[nn.Module]:
    """The modules below whose tensors are known to meet the input as they are.

    That of a chain is `known` of all modules below it.
    """
    kind = type(module)
    if kind in _CHECKED:
        return [] if touched(module) else [module]
    known = known or KINDS.get(kind) == "chain"
    if known or kind.__module__.startswith("densenet_fast.") or kind in _CONTAINERS:
        children = [child for child in module.children() if not touched(child)]
        return [part for child in children for part in _checked(child, known=known)]
    return []


def _path(owner: nn.Module, part: nn.Module) -> str:
    names = [name for name, module in owner.named_modules() if module is part]
    return f"{names[0]}." if names and names[0] else ""


def output_size(module: nn.Module, size: Size) -> Size | None:
    """The images' size behind `module`, or None where that cannot be known."""
    if touched(module):
        return None
    kind, own = type(module), KINDS.get(type(module))
    if own in ("block", "layer") or kind in _KEEP_SIZE or is_norm(module):
        return size
    if own == "transition":
        through: Size | None = size
        for child in module._modules.values():
            if through is None or child is None:
                return None
            through = output_size(child, through)
        return through
    dims = len(size)
    if kind not in (*CONVS, *MAXIMA, *AVERAGES) or OF_TYPE[kind] != dims:
        return None
    state: Any = module.__dict__
    stride = _each(state["stride"], dims)
    if setting(state, "ceil_mode") or isinstance(state["padding"], str) or min(stride) < 1:
        return None  # of a stride of 0, PyTorch's error is to come
    kernel, padding = _each(state["kernel_size"], dims), _each(state["padding"], dims)
    return windows(size, kernel, stride, padding, _each(setting(state, "dilation"), dims))


def _each(value: Any, dims: int) -> Size:
    return (value,) * dims if isinstance(value, int) else value


def _through(modules: list[nn.Module], size: Size) -> tuple[list[tuple[nn.Module, Size]], bool]:
    """The modules, each with the size of its input, as far as known; and whether pixels stay."""
    known: list[tuple[nn.Module, Size]] = []
    through: Size | None = size
    for module in modules:
        if through is None:
            break
        known.append((module, through))
        through = output_size(module, through)
        if through is not None and min(through) < 1:
            return known, False
    return known, True


def chain(owner: str, modules: Iterable[nn.Module], input: Tensor) -> list[nn.Module]:
    """Refuse other channels, images too small for pooling, and norms that would see one value each.

    Returns the modules whose input size is known.
    """
    called = list(modules)
    channels(owner, input, called[0] if called else None)
    n, _, *size = input.shape
    known, fit = _through(called, size)
    if not fit:
        dims, edges = len(size), range(1, _LARGEST_SEARCHED)
        minimum = next((edge for edge in edges if _through(called, (edge,) * dims)[1]), None)
        raise ValueError(
            f"{owner} got images too small for its pooling: {_text(size)}, "
            f"expected at least {_text([minimum] * dims)}"
        )
    for module, through in known:
        if n * math.prod(through) == 1:
            _values_per_channel(module, through)
    return [module for module, _ in known]


def _text(size: Sequence[object]) -> str:
    return "×".join(map(str, size))


def _values_per_channel(module: nn.Module, through: Size) -> None:
    """BatchNorm's own error, if a norm below `module` would take statistics of a single value."""
    for norm in module.modules():
        if is_norm(norm) and takes_statistics(norm) and not group_of(norm):
            size = torch.Size([1, channels_of(norm), *through])
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {size}"
            )
