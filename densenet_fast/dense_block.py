"""A dense block with the transition or the final norm behind it, as one autograd node.

All layers read and write one feature buffer X, channels innermost; each channel's statistics are
taken once, when it is produced. The backward walks over one gradient buffer G and defers the
correction for batch statistics until all readers of a channel are done. Kept in between:

- `checkpoint="none"`: X and every layer's bottleneck;
- `checkpoint="bottleneck"`: X, from which the backward recomputes the bottlenecks;
- `checkpoint="block"`: the block's input, from which the backward recomputes X.

`hold` spares the last layers the recomputation of their bottleneck: those are kept besides X, or
with "block" from the recomputation of X until the backward is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast import autocast
from densenet_fast.block_backward import gradients
from densenet_fast.block_checks import check_block
from densenet_fast.block_forward import Geometry, Statistics, forward
from densenet_fast.first_order import first_order_only
from densenet_fast.philox import draw_seeds
from densenet_fast.specs import (
    CHECKPOINT_MODES,
    AvgPoolTail,
    Checkpoint,
    LayerSpec,
    NormSpec,
    Tail,
    TransitionTail,
    layer_buffers,
    layer_parameters,
    tail_buffers,
    tail_parameters,
    with_layer_tensors,
    with_tail_tensors,
    without_layer_tensors,
    without_tail_tensors,
)
from densenet_fast.stem import conv_stem, stem_norm_relu_maxpool

__all__ = [
    "CHECKPOINT_MODES",
    "AvgPoolTail",
    "Checkpoint",
    "LayerSpec",
    "NormSpec",
    "Tail",
    "TransitionTail",
    "conv_stem",
    "dense_block",
    "stem_norm_relu_maxpool",
]

_FIRST_PARAMETER = 8  # its position among the arguments of `_DenseBlock.apply`


def dense_block(
    input: Tensor,
    layers: Sequence[LayerSpec],
    *,
    tail: Tail | None = None,
    checkpoint: Checkpoint = "bottleneck",
    hold: int = 0,
) -> Tensor:
    """Run `layers` on `input` [N, C0, H, W] and, fused behind them, `tail`.

    Returns the concatenated features [N, C, H, W] without a tail, [N, Cout, H // 2, W // 2] behind
    a `TransitionTail` (both channels last in memory), [N, C] behind an `AvgPoolTail`. `hold` is the
    number of last layers whose bottleneck is held for the backward; with `checkpoint="none"` all
    are.
    """
    input, layers, tail = autocast.lowered(input, layers, tail)
    with autocast.disabled(input.device.type):
        return _dense_block(input, layers, tail, checkpoint, hold)


def _dense_block(
    input: Tensor, layers: Sequence[LayerSpec], tail: Tail | None, checkpoint: Checkpoint, hold: int
) -> Tensor:
    check_block(input, layers, tail, checkpoint, hold)
    hold = len(layers) if checkpoint == "none" else hold
    geometry = Geometry(input.shape, layers, tail)
    seeds = _draw_seeds(layers)
    parameters = [tensor for layer in layers for tensor in layer_parameters(layer)]
    parameters += tail_parameters(tail)
    differentiable = torch.is_grad_enabled() and (
        input.requires_grad
        or any(tensor is not None and tensor.requires_grad for tensor in parameters)
    )
    if differentiable:
        # A way back to the input that keeps none of it alive: second derivatives must be found
        # out also where the backward does not need the input.
        link = input[:0].sum() if input.requires_grad else None
        output: Tensor = _DenseBlock.apply(
            input, link, layers, tail, geometry, seeds, checkpoint, hold, *parameters
        )
        return output
    with torch.no_grad():
        return forward(input, layers, tail, geometry, seeds, keep=0)[0]


def backward_reads(output: Tensor) -> bool:
    """Whether `output` is a block's feature buffer, which its backward reads.

    In a graph it may be: Dynamo does not know where a tensor comes from.
    """
    if torch.compiler.is_compiling():
        return True
    node: Any = output.grad_fn
    fused = type(node) is _DenseBlock._backward_cls
    return fused and node.tail is None and node.checkpoint != "block"


def released(output: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`output` in this format, for others' code, which may write to it: never a feature buffer.

    Autograd would notice most writes, and not those through `.data` or a NumPy array.
    """
    if output.dim() != 4:
        memory_format = torch.preserve_format
    if backward_reads(output):
        return output.clone(memory_format=memory_format)
    if memory_format is torch.preserve_format:
        return output
    return output.contiguous(memory_format=memory_format)


def _draw_seeds(layers: Sequence[LayerSpec]) -> list[int]:
    """One seed for each layer with dropout (0 for the others), from torch's default generator."""
    dropping = [layer.dropout > 0 for layer in layers]
    if not any(dropping):
        return [0] * len(dropping)
    drawn = iter(draw_seeds(sum(dropping)).tolist())
    return [next(drawn) if drops else 0 for drops in dropping]


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        link: Tensor | None,
        layers: Sequence[LayerSpec],
        tail: Tail | None,
        geometry: Geometry,
        seeds: Sequence[int],
        checkpoint: Checkpoint,
        hold: int,
        *parameters: Tensor | None,
    ) -> Tensor:
        keep = 0 if checkpoint == "block" else hold
        output, result = forward(input, layers, tail, geometry, seeds, keep=keep)
        # The buffer is either the output itself or never leaves: in both cases the version counter
        # notices whoever writes into it before the backward has read it.
        anchor = input if checkpoint == "block" else result.buffer
        tensors = [tensor for layer in layers for tensor in layer_buffers(layer)]
        tensors += tail_buffers(tail)
        ctx.save_for_backward(
            link, anchor, result.statistics, *result.bottlenecks, *parameters, *tensors
        )
        ctx.kept_bottlenecks, ctx.hold = len(result.bottlenecks), hold
        ctx.layers = [without_layer_tensors(layer) for layer in layers]
        ctx.tail = without_tail_tensors(tail)
        ctx.geometry, ctx.seeds, ctx.checkpoint = geometry, seeds, checkpoint
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        with torch.no_grad(), autocast.disabled(grad_outputs[0].device.type):
            saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses a second reading
            found = _backward(ctx, saved, grad_outputs[0])
        behind = [*grad_outputs, *saved]
        input, *others = first_order_only("a fused dense block", found, behind)
        return (input, *[None] * (_FIRST_PARAMETER - 1), *others)


def _backward(ctx: Any, saved: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of the input and of every parameter, from what the forward has kept."""
    _, anchor, vector, *tensors = saved
    bottlenecks, tensors = tensors[: ctx.kept_bottlenecks], tensors[ctx.kept_bottlenecks :]
    layers, tail = _restore(ctx.layers, ctx.tail, tensors)
    geometry: Geometry = ctx.geometry
    needed = ctx.needs_input_grad
    return gradients(
        geometry,
        layers,
        tail,
        anchor,
        Statistics(geometry, vector),
        bottlenecks,
        ctx.seeds,
        ctx.checkpoint,
        ctx.hold,
        [needed[0], *needed[_FIRST_PARAMETER:]],
        grad_output,
    )


def _restore(
    layers: Sequence[LayerSpec], tail: Tail | None, tensors: Sequence[Tensor | None]
) -> tuple[list[LayerSpec], Tail | None]:
    """The specs with their tensors again: first all parameters, then all buffers."""
    parameters = 6 * len(layers)
    buffers = parameters + len(tail_parameters(tail))
    restored = [
        with_layer_tensors(
            layer,
            tensors[6 * index : 6 * index + 6],
            tensors[buffers + 4 * index : buffers + 4 * index + 4],
        )
        for index, layer in enumerate(layers)
    ]
    return restored, with_tail_tensors(
        tail, tensors[parameters:buffers], tensors[buffers + 4 * len(layers) :]
    )
