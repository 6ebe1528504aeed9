"""Calls of every operator, of any shape, type and memory layout."""

from __future__ import annotations

import math

import torch
from devices import device
from kernel_calls import Call, Calls, Maker, Pixels, act, averaged, maxima, named, taps
from torch import Tensor

from densenet_fast.operators import reference
from densenet_fast.operators.rows import channels_last_format

# ---- Convolutions


def forward(
    op: str,
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    statistics: bool = True,
    wide_weight: bool = False,
    linear: bool = False,
) -> Calls:
    """`op` is conv1x1_forward, conv3x3_forward or transition_forward, which may be `linear`."""
    kernel = taps(pixels) if op == "conv3x3_forward" else ()
    transition = op == "transition_forward"
    out_pixels = averaged(pixels) if transition else pixels
    source, out = {
        "conv1x1_forward": ("features", "bottleneck"),
        "conv3x3_forward": ("bottleneck", "growth"),
        "transition_forward": ("features", "out"),
    }[op]

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            source: maker.input(pixels, norm),
            **act(norm),
            "weight": _weight(maker, wide_weight, outputs, channels, *kernel),
            out: maker.result(out_pixels, outputs),
            **(maker.results(outputs, "mean", "var") if statistics else _none("mean", "var")),
            **({"linear": linear} if transition else {}),
        }
        rows = math.prod(out_pixels)
        lengths = {out: channels * math.prod(kernel), "mean": rows, "var": rows}
        return Call(op, maker, arguments, lengths, {"mean": out, "var": out})

    return make


def _none(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _weight(maker: Maker, wide: bool, *shape: int) -> Tensor:
    weight = maker.weight(*shape)
    return weight.float() + 1e-3 * torch.sign(weight.float()) if wide else weight


def _gradients(
    maker: Maker, wanted: str, channels: int, data: str, buffer: Tensor
) -> dict[str, Tensor | None]:
    """The data gradient and the norm's, as `wanted` says: "data", "sums" or "weight" only."""
    sums = maker.results(channels, "grad_gamma", "grad_beta")
    if "data" in wanted:
        return {data: buffer, **sums}
    return {data: None, **(sums if "sums" in wanted else _none("grad_gamma", "grad_beta"))}


def _weight_gradient(maker: Maker, wanted: str, weight: Tensor) -> dict[str, Tensor | None]:
    if "weight" not in wanted:
        return {"grad_weight": None}
    gradient = maker.gradient(*weight.shape, dtype=weight.dtype)
    if maker.channels_last:
        gradient = gradient.contiguous(memory_format=channels_last_format(weight.dim()))
    return {"grad_weight": gradient}


WANTED = ("data weight", "data", "sums", "weight", "sums weight")


def conv1x1_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels)
        arguments = {
            "grad_norm": maker.rows(pixels, outputs),
            "bottleneck": maker.rows(pixels, outputs),
            "coefficients": torch.stack([maker.vector(outputs) for _ in range(3)]),
            "features": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            **_gradients(maker, wanted, channels, "grad_features", maker.rows(pixels, channels)),
            **_weight_gradient(maker, wanted, weight),
        }
        rows = math.prod(pixels)
        sums = {"grad_gamma": rows * outputs, "grad_beta": rows * outputs}
        lengths = {"grad_features": outputs, **sums, "grad_weight": rows}
        return Call("conv1x1_backward", maker, arguments, lengths)

    return make


def conv3x3_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
    accumulate: bool = False,
) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels, *taps(pixels))
        room = maker.rows if accumulate else maker.result
        arguments = {
            "grad_growth": maker.rows(pixels, outputs),
            "bottleneck": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            **_gradients(maker, wanted, channels, "grad_norm", room(pixels, channels)),
            **_weight_gradient(maker, wanted, weight),
            "accumulate": accumulate,
        }
        rows = math.prod(pixels)
        reduced = outputs * math.prod(taps(pixels))
        sums = {"grad_gamma": rows * reduced, "grad_beta": rows * reduced}
        lengths = {"grad_norm": reduced, **sums, "grad_weight": rows}
        return Call("conv3x3_backward", maker, arguments, lengths)

    return make


def transition_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
    linear: bool = False,
) -> Calls:
    pooled = averaged(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels)
        arguments = {
            "grad_out": maker.rows(pooled, outputs),
            "features": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            "grad_features": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
            **_weight_gradient(maker, wanted, weight),
            "linear": linear,
        }
        rows = math.prod(pixels)
        sums = {"grad_gamma": rows * outputs, "grad_beta": rows * outputs}
        lengths = {"grad_features": outputs, **sums, "grad_weight": rows}
        return Call("transition_backward", maker, arguments, lengths)

    return make


# ---- Operators without products


def channel_statistics(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        rows = math.prod(pixels)
        # A mean far from zero: a sum of squares would lose the variance.
        values = maker.randn(*pixels, channels) + 30
        arguments = {
            "features": maker.rows(pixels, channels, values),
            **maker.results(channels, "mean", "var"),
        }
        return Call("channel_statistics", maker, arguments, {"mean": rows, "var": rows})

    return make


def finish_gradient(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        rows = math.prod(pixels)
        sums = maker.vectors(channels, "mean", "sum_grad", "sum_grad_x")
        arguments = {
            "features": maker.rows(pixels, channels),
            "grad_features": maker.rows(pixels, channels),
            "mean": sums["mean"],
            "sum_grad": sums["sum_grad"] * rows,
            "sum_grad_x": sums["sum_grad_x"] * rows,
            "out": maker.result(pixels, channels),
        }
        return Call("finish_gradient", maker, arguments, {"out": 8})

    return make


def dropout(pixels: Pixels, channels: int, p: float, seed: int = 123456789012345) -> Calls:
    def make(maker: Maker) -> Call:
        arguments = {"growth": maker.rows(pixels, channels), "seed": seed, "p": p}
        return Call("dropout_", maker, arguments, {"growth": 1})

    return make


def avgpool_forward(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "features": maker.input(pixels, norm),
            **act(norm),
            "out": maker.gradient(pixels[0], channels),
        }
        return Call("norm_relu_avgpool_forward", maker, arguments, {"out": math.prod(pixels[1:])})

    return make


def avgpool_backward(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "grad_out": maker.randn(pixels[0], channels).to(maker.dtype),
            "features": maker.input(pixels, norm),
            **named(norm),
            "grad_features": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
        }
        rows = math.prod(pixels)
        lengths = {"grad_features": 2, "grad_gamma": rows, "grad_beta": rows}
        return Call("norm_relu_avgpool_backward", maker, arguments, lengths)

    return make


def maxpool_forward(pixels: Pixels, channels: int) -> Calls:
    pooled = maxima(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "input": maker.input(pixels, norm),
            **act(norm),
            "out": maker.result(pooled, channels),
            "argmax": torch.full((*pooled, channels), 99, dtype=torch.uint8, device=device()),
        }
        return Call("norm_relu_maxpool_forward", maker, arguments, {"out": 2, "argmax": 1})

    return make


def maxpool_backward(pixels: Pixels, channels: int, *, batch_statistics: bool = True) -> Calls:
    pooled = maxima(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        images = maker.input(pixels, norm)
        argmax = torch.empty((*pooled, channels), dtype=torch.uint8, device=device())
        out = torch.empty((*pooled, channels), dtype=maker.dtype, device=device())
        reference.norm_relu_maxpool_forward(images, *tuple(norm)[:2], out, argmax)
        arguments = {
            "grad_out": maker.rows(pooled, channels),
            "argmax": argmax,
            "input": images,
            **named(norm),
            "batch_statistics": batch_statistics,
            "grad_input": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
        }
        rows = math.prod(pixels)
        lengths = {"grad_input": 4 ** len(pixels[1:]), "grad_gamma": rows, "grad_beta": rows}
        return Call("norm_relu_maxpool_backward", maker, arguments, lengths)

    return make
