"""What a dense block expects of its input and parameters, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_fast.blocks import synchronized
from densenet_fast.blocks.specs import (
    CHECKPOINT_MODES,
    SHAPES,
    AvgPoolTail,
    LayerSpec,
    MaxTransition,
    NormSpec,
    Tail,
    TransitionTail,
)

_HALF_TYPES = (torch.float16, torch.bfloat16)


_NUMERALS = {1: "three", 2: "four", 3: "five"}


def check_input(input: Tensor, weight: Tensor | None = None) -> None:
    """An image batch with something in it, of the dimensions that `weight`, if given, is for."""
    known = [weight.dim() - 2] if weight is not None and weight.dim() - 2 in SHAPES else [*SHAPES]
    if input.dim() - 2 not in known:
        expected = " or ".join(f"{_NUMERALS[dims]} dimensions {SHAPES[dims]}" for dims in known)
        raise ValueError(f"the input should have {expected}, got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"the input should have a floating-point type, got {input.dtype}")
    if not input.numel():
        raise ValueError(
            f"the input should have at least one image, channel and pixel, got shape "
            f"{tuple(input.shape)}"
        )


def check_block(
    input: Tensor, layers: Sequence[LayerSpec], tail: Tail | None, checkpoint: str, hold: int
) -> None:
    """Everything a block's forward relies on."""
    if checkpoint not in CHECKPOINT_MODES:
        raise ValueError(
            f"checkpoint should be one of {', '.join(map(repr, CHECKPOINT_MODES))}, "
            f"got {checkpoint!r}"
        )
    if not 0 <= hold <= len(layers):
        raise ValueError(
            f"hold should be between 0 and the number of layers, {len(layers)}, got {hold!r}"
        )
    weights = [layer.conv2_weight for layer in layers]
    if isinstance(tail, TransitionTail):
        weights.append(tail.conv_weight)
    check_input(input, next(iter(weights), None))
    images, channels, *size = input.shape
    pixels = (images, *size)
    for index, layer in enumerate(layers):
        at = f"layer {index + 1}: "
        outputs = channels
        if layer.conv1_weight is not None:
            check_norm(layer.norm1, at + "norm1", channels, input, pixels)
            outputs = _check_conv(layer.conv1_weight, at + "conv1", channels, 1, input)
        check_norm(layer.norm2, at + "norm2", outputs, input, pixels)
        growth = _check_conv(layer.conv2_weight, at + "conv2", outputs, 3, input)
        if layer.conv2_bias is not None:
            _check_vector(layer.conv2_bias, at + "conv2.bias", growth, input)
        channels += growth
        _check_dropout(layer.dropout, at)
    if isinstance(tail, TransitionTail):
        _check_transition(tail, channels, input)
    elif isinstance(tail, AvgPoolTail):
        check_norm(tail.norm, "final norm", channels, input, pixels)
    elif tail is not None:
        raise TypeError(
            f"tail should be None, a TransitionTail or an AvgPoolTail, got {type(tail).__name__}"
        )
    _check_groups(layers, tail)


def check_max_transition(input: Tensor, transition: MaxTransition) -> None:
    """Everything a transition's forward relies on."""
    check_input(input, transition.conv_weight)
    _check_transition(transition, input.shape[1], input)
    _check_dropout(transition.dropout, "transition: ")
    bias, outputs = transition.conv_bias, len(transition.conv_weight)
    if bias is not None:
        _check_vector(bias, "transition: conv.bias", outputs, input)


def _check_transition(
    transition: TransitionTail | MaxTransition, channels: int, input: Tensor
) -> None:
    images, _, *size = input.shape
    check_norm(transition.norm, "transition: norm", channels, input, (images, *size))
    _check_conv(transition.conv_weight, "transition: conv", channels, 1, input)
    if min(size) < 2:
        least = "x".join(["2"] * len(size))
        raise ValueError(
            f"the transition's {least} pooling needs an image of at least {least} pixels, got "
            f"{'x'.join(map(str, size))}"
        )


def _check_dropout(probability: float, at: str) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"{at}dropout should be a probability between 0 and 1, got {probability}")


def _check_groups(layers: Sequence[LayerSpec], tail: Tail | None) -> None:
    """One set of statistics of the features for all norms that read them."""
    reading = [layer.of_features for layer in layers] + ([] if tail is None else [tail.norm])
    groups = {norm.group for norm in reading if norm.batch_statistics}
    if len(groups) > 1:
        raise ValueError(
            "all norms that read a block's features should take the batch's statistics over the "
            f"same process group, or all without one, got {len(groups)} different ones"
        )
    for norm in (*reading, *(layer.norm2 for layer in layers)):
        if norm.group and not norm.batch_statistics:
            raise ValueError("a norm with a process group should use the batch's statistics")


def check_norm(
    norm: NormSpec, name: str, channels: int, input: Tensor, pixels: Sequence[int]
) -> None:
    """Parameters and statistics of a norm over `channels`, and enough values to take them from."""
    if norm.group:
        synchronized.check(norm.group, input.device, name)
    elif norm.batch_statistics and math.prod(pixels) == 1:
        size = torch.Size((pixels[0], channels, *pixels[1:]))
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
        )
    if not norm.batch_statistics and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(
            f"{name} should have running statistics, as it does not use the batch's, got None"
        )
    for part in ("weight", "bias", "running_mean", "running_var"):
        vector: Tensor | None = getattr(norm, part)
        if vector is not None:
            _check_vector(vector, f"{name}.{part}", channels, input)


def _check_vector(vector: Tensor, name: str, channels: int, input: Tensor) -> None:
    if vector.shape != (channels,):
        raise ValueError(
            f"{name} should have shape ({channels},), one number for each channel, got "
            f"{tuple(vector.shape)}"
        )
    _check_place(vector, name, input)


def _check_conv(weight: Tensor, name: str, channels: int, kernel: int, input: Tensor) -> int:
    """The number of output channels of a convolution that fits."""
    expected = (channels, *[kernel] * (input.dim() - 2))
    if weight.shape[1:] != expected or not len(weight):
        raise ValueError(
            f"{name}.weight should have shape (outputs, {', '.join(map(str, expected))}), got "
            f"{tuple(weight.shape)}"
        )
    _check_place(weight, f"{name}.weight", input)
    return weight.shape[0]


def _check_place(parameter: Tensor, name: str, input: Tensor) -> None:
    # BatchNorm, too, accepts float32 parameters with input of half the width.
    if not _fits(parameter.dtype, input.dtype):
        raise TypeError(
            f"{name} should have the type of the input, {input.dtype}, got {parameter.dtype}"
        )
    _check_device(parameter, name, input)


def _fits(parameter: torch.dtype, input: torch.dtype) -> bool:
    """The input's type, or float32 under autocast."""
    return parameter == input or (parameter == torch.float32 and input in _HALF_TYPES)


def _check_device(tensor: Tensor, name: str, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(
            f"{name} should be on the input's device, {input.device}, got a tensor on "
            f"{tensor.device}"
        )
