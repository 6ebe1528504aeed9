"""A dense block, with what is fused behind it, as operators of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from densenet_fast import autocast
from densenet_fast.backend import select
from densenet_fast.block_backward import gradients
from densenet_fast.block_checks import check_block
from densenet_fast.block_forward import Geometry, Statistics, forward
from densenet_fast.graph_library import (
    define,
    differentiable,
    handed_back,
    no_gradients,
    wanted,
    wanted_like,
)
from densenet_fast.graph_specs import BlockArguments, block_arguments, block_specs, spread
from densenet_fast.graph_statistics import Part, count_step
from densenet_fast.layout import empty_channels_last, row_pitch, statistics_dtype
from densenet_fast.philox import draw_seeds
from densenet_fast.specs import Checkpoint, LayerSpec, Tail, TransitionTail

_BLOCK = (
    "Tensor[] parameters, Tensor[] buffers, bool[] present, float[] eps, "
    "bool[] batch_statistics, float[] dropout, str tail, Tensor? seeds, str checkpoint, int hold"
)


class _Block:
    """The arguments behind the first ones of a block's two operators."""

    def __init__(self, like: Tensor, *args: Any) -> None:
        """Make specs of `args` for features as those of `like`."""
        parameters, buffers, present, eps, batch_statistics, dropout, tail, seeds, *rest = args
        arguments = BlockArguments(
            parameters, buffers, present, eps, batch_statistics, dropout, tail
        )
        self.layers, self.tail = block_specs(arguments)
        self.checkpoint, self.hold = rest
        self._seeds: Tensor | None = seeds
        self.like = like

    def seeds(self) -> list[int]:
        """One for each layer; 0 where nothing is dropped."""
        drawn = iter([] if self._seeds is None else self._seeds.tolist())
        return [next(drawn) if layer.dropout > 0 else 0 for layer in self.layers]

    @property
    def kept(self) -> int:
        """Bottlenecks that the forward leaves behind."""
        return 0 if self.checkpoint == "block" else self.hold

    def lowered(self) -> tuple[list[LayerSpec], Tail | None]:
        """The specs with convolutions in the features' type, where the operators want that."""
        if select(self.like) != "reference":
            return self.layers, self.tail
        dtype = self.like.dtype
        layers = [
            replace(
                layer,
                conv1_weight=layer.conv1_weight.to(dtype),
                conv2_weight=layer.conv2_weight.to(dtype),
            )
            for layer in self.layers
        ]
        tail = self.tail
        if isinstance(tail, TransitionTail):
            tail = replace(tail, conv_weight=tail.conv_weight.to(dtype))
        return layers, tail


def _forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    block = _Block(input, *args)
    layers, tail = block.lowered()
    check_block(input, layers, tail, block.checkpoint, block.hold)
    geometry = Geometry(input.shape, layers, tail)
    output, result = forward(input, layers, tail, geometry, block.seeds(), keep=block.kept)
    kept = list(result.bottlenecks)
    if tail is not None and block.checkpoint != "block":
        kept.insert(0, result.buffer)
    return output, result.statistics, kept


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    block = _Block(input, *args)
    layers, tail = block.layers, block.tail
    check_block(input, layers, tail, block.checkpoint, block.hold)
    geometry = Geometry(input.shape, layers, tail)
    images, height, width = geometry.pixels
    pitch = geometry.channels
    if tail is not None:
        pitch = row_pitch(pitch, input.itemsize, cuda=input.is_cuda)
    buffer = empty_channels_last((images, geometry.channels, height, width), input, pitch)
    widths = geometry.widths[len(layers) - block.kept :]
    kept = [input.new_empty(images, height, width, bottleneck) for bottleneck in widths]
    statistics = input.new_empty(Statistics.size(geometry), dtype=statistics_dtype(input.dtype))
    if tail is None:
        return buffer, statistics, kept
    if block.checkpoint != "block":
        kept.insert(0, buffer)
    if isinstance(tail, TransitionTail):
        shape = (images, tail.conv_weight.shape[0], height // 2, width // 2)
        return empty_channels_last(shape, input), statistics, kept
    return input.new_empty(images, geometry.channels), statistics, kept


def _backward(
    grad_output: Tensor, anchor: Tensor, statistics: Tensor, bottlenecks: list[Tensor], *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    block = _Block(anchor, *args)
    layers, tail = block.lowered()
    shape = list(anchor.shape)
    if block.checkpoint != "block":
        shape[1] -= sum(layer.conv2_weight.shape[0] for layer in layers)
    geometry = Geometry(shape, layers, tail)
    found = gradients(
        geometry,
        layers,
        tail,
        anchor,
        Statistics(geometry, statistics),
        bottlenecks,
        block.seeds(),
        block.checkpoint,
        block.hold,
        needs,
        grad_output,
    )
    parameters = spread(args[0], args[2][: len(needs) - 1])
    return wanted(found, [anchor, *parameters], needs)


def _backward_fake(
    grad_output: Tensor, anchor: Tensor, statistics: Tensor, bottlenecks: list[Tensor], *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    block = _Block(anchor, *args)
    images, channels, height, width = anchor.shape
    if block.checkpoint != "block":
        channels -= sum(layer.conv2_weight.shape[0] for layer in block.layers)
    found = [empty_channels_last((images, channels, height, width), anchor)] if needs[0] else []
    return found + wanted_like(args[0], args[2], needs[1:])


_forward_operator = define(
    "dense_block",
    f"(Tensor input, {_BLOCK}) -> (Tensor, Tensor, Tensor[])",
    _forward,
    _forward_fake,
)
_backward_operator = define(
    "dense_block_backward",
    "(Tensor grad_output, Tensor anchor, Tensor statistics, Tensor[] bottlenecks, "
    f"{_BLOCK}, bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, parameters, buffers, *spec = inputs
    result, statistics, kept = output
    tail, seeds, checkpoint = spec[4], spec[5], spec[6]
    if checkpoint == "block":
        anchor, bottlenecks = input, kept
    elif tail == "none":
        anchor, bottlenecks = result, kept
    else:
        anchor, *bottlenecks = kept
    ctx.mark_non_differentiable(statistics, *kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(anchor, statistics, seeds, *bottlenecks, *parameters, *buffers)
    ctx.counts = len(bottlenecks), len(parameters)
    ctx.spec = (*spec[:5], *spec[6:])  # without the seeds
    ctx.nothing = no_gradients(inputs)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return tuple(ctx.nothing)
    anchor, statistics, seeds, *tensors = ctx.saved_tensors
    bottlenecks, tensors = tensors[: ctx.counts[0]], tensors[ctx.counts[0] :]
    parameters, buffers = tensors[: ctx.counts[1]], tensors[ctx.counts[1] :]
    input_needed, parameters_needed = ctx.needs_input_grad[:2]
    present = ctx.spec[0]
    slots = len(present) - 4 * len(ctx.spec[3]) - 2 * (ctx.spec[4] != "none")
    needs = [bool(need) for need in spread(parameters_needed, present[:slots])]
    gradients = _backward_operator(
        grad_output,
        anchor,
        statistics,
        bottlenecks,
        parameters,
        buffers,
        *ctx.spec[:5],
        seeds,
        *ctx.spec[5:],
        [input_needed, *needs],
    )
    return handed_back(ctx.nothing, gradients, input_needed, parameters_needed)


differentiable("dense_block", "a fused dense block", _gradients, _save)


def dense_block(
    input: Tensor,
    layers: Sequence[LayerSpec],
    tail: Tail | None,
    checkpoint: Checkpoint,
    hold: int,
) -> Tensor:
    """`densenet_fast.dense_block.dense_block` as a part of a graph, with the counting of its step.

    The seeds of dropout are drawn in the graph: by torch's generator where that is PyTorch's own
    code, by the compiler's where it draws numbers itself.
    """
    input = autocast.cast(input)
    hold = len(layers) if checkpoint == "none" else hold
    block = block_arguments(layers, tail)
    dropping = sum(dropout > 0 for dropout in block.dropout)
    seeds = draw_seeds(dropping) if dropping else None
    output, statistics, _ = _forward_operator(
        input,
        block.parameters,
        block.buffers,
        block.present,
        block.eps,
        block.batch_statistics,
        block.dropout,
        block.tail,
        seeds,
        checkpoint,
        hold,
    )
    parts = _parts(input.shape[1], layers, tail)
    images, _, height, width = input.shape
    count_step(statistics, parts, images * height * width)
    return output


def _parts(channels: int, layers: Sequence[LayerSpec], tail: Tail | None) -> list[Part]:
    """Where each norm's mean and variance are in the vector of `Statistics`."""
    end = channels + sum(layer.conv2_weight.shape[0] for layer in layers)
    parts: list[Part] = []
    bottleneck = 2 * end
    for layer in layers:
        width = layer.conv1_weight.shape[0]
        parts.append((layer.norm1, 0, end, channels))
        parts.append((layer.norm2, bottleneck, bottleneck + width, width))
        bottleneck += 2 * width
        channels += layer.conv2_weight.shape[0]
    if tail is not None:
        parts.append((tail.norm, 0, end, end))
    return parts
