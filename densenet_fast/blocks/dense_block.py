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

from densenet_fast.blocks import autocast, nodes, norms
from densenet_fast.blocks.backward import gradient_pitch, gradients
from densenet_fast.blocks.checks import check_block
from densenet_fast.blocks.forward import (
    Block,
    Geometry,
    Statistics,
    feature_buffer,
    forward,
    halved,
    held,
    norm_places,
)
from densenet_fast.blocks.nodes import Finish
from densenet_fast.blocks.specs import (
    CHECKPOINT_MODES,
    AvgPoolTail,
    Checkpoint,
    LayerSpec,
    NormSpec,
    Settings,
    Tail,
    Tensors,
    TransitionTail,
    block_norms,
    flattened,
)
from densenet_fast.blocks.stem import conv_stem, stem_norm_relu_maxpool
from densenet_fast.operators.backends import select
from densenet_fast.operators.philox import draw_seeds
from densenet_fast.operators.rows import (
    channels_last_format,
    empty_channels_last,
    statistics_dtype,
)

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

_BLOCK = (
    "Tensor?[] parameters, Tensor?[] buffers, Tensor? seeds, float[] eps, bool[] batch_statistics, "
    "str[] groups, float[] dropout, bool[] whole_channels, str tail, bool linear, str checkpoint, "
    "int hold"
)


def dense_block(
    input: Tensor,
    layers: Sequence[LayerSpec],
    *,
    tail: Tail | None = None,
    checkpoint: Checkpoint = "bottleneck",
    hold: int = 0,
) -> Tensor:
    """Run `layers` on `input` [N, C0, *size], of one to three sizes, and, fused behind, `tail`.

    Returns the concatenated features [N, C, *size] without a tail, with halved sizes behind a
    `TransitionTail` (both channels innermost in memory), [N, C] behind an `AvgPoolTail`. `hold` is
    the number of last layers whose bottleneck is held for the backward; with `checkpoint="none"`
    all are.
    """
    check_block(autocast.cast(input), layers, tail, checkpoint, hold)
    return fused(input, FlatBlock(layers, tail), checkpoint, hold)


class FlatBlock:
    """A block's tensors and numbers, which serve for as many calls as they stay the same."""

    def __init__(self, layers: Sequence[LayerSpec], tail: Tail | None) -> None:
        """Describe `layers` and `tail`."""
        self.layers, self.tail = layers, tail
        self.parameters, self.buffers, self.settings = flattened(layers, tail)
        self._updates: norms.Updates | None = None

    def updates(self, shape: Sequence[int]) -> norms.Updates:
        """What a step on an input [N, C0, *size] changes of running statistics and counters."""
        if self._updates is None:
            geometry = Geometry(shape, self.parameters, self.settings)
            places = norm_places(geometry, block_norms(self.layers, self.tail))
            self._updates = norms.updates(places)
        return self._updates


def fused(input: Tensor, block: FlatBlock, checkpoint: Checkpoint, hold: int) -> Tensor:
    """`dense_block` of what modules have found to fit.

    Kernels look at every size again before they run; where one does not fit after all, the error is
    that of `check_block`.
    """
    input = autocast.cast(input)
    parameters, buffers = block.parameters, block.buffers
    hold = len(block.layers) if checkpoint == "none" else hold
    settings = block.settings._replace(checkpoint=checkpoint, hold=hold)
    dropping = sum(dropout > 0 for dropout in settings.dropout)
    seeds = draw_seeds(dropping) if dropping else None

    def finish(statistics: Tensor) -> None:
        count = input.shape[0] * input.shape[2:].numel()
        nodes.record(statistics, block.updates(input.shape), count)

    try:
        if torch.is_grad_enabled() and (
            input.requires_grad or any(p is not None and p.requires_grad for p in parameters)
        ):
            # A way back to the input that keeps none of it alive: second derivatives must be found
            # out also where the backward does not need the input.
            link = None
            if input.requires_grad and not nodes.recorded(input):
                link = input[:0].sum()
            rest = (seeds, settings, len(parameters))
            return nodes.applied(_DenseBlock, input, link, finish, rest, parameters, buffers)
        settings = settings._replace(hold=0)
        output, statistics, _ = block_forward(input, parameters, buffers, seeds, *settings)
        finish(statistics)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_block(input, block.layers, block.tail, checkpoint, hold)
        raise
    return output


def _block(shape: Sequence[int], like: Tensor, args: Sequence[Any]) -> Block:
    """The block with weights of a type that goes with features as those of `like`."""
    parameters, buffers, seeds, *rest = args
    settings = Settings(*rest)
    # The kernels round float32 weights in passing and return float32 gradients: no copies.
    taken = {like.dtype, torch.float32} if select(like) != "reference" else {like.dtype}
    weights = [*parameters[2 : 6 * len(settings.dropout) : 3]]
    if settings.tail == "transition":
        weights.append(parameters[-1])
    types = {weight.dtype for weight in weights if weight is not None}
    if not types <= taken:
        # Those of autocast alone: what another type means, nobody has said.
        if types - taken - {torch.float32} or like.dtype not in autocast.CAST_TYPES:
            raise RuntimeError(f"weights of {types} do not go with features of {like.dtype}")
        parameters = [
            p if p is None or p.dim() == 1 or p.dtype in taken else p.to(like.dtype)
            for p in parameters
        ]
    return Block(shape, parameters, buffers, seeds, settings)


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    parameters, _, _, *rest = args
    settings = Settings(*rest)
    geometry = Geometry(input.shape, parameters, settings)
    images, *size = geometry.pixels
    buffer, features = feature_buffer(input, geometry, padded=settings.tail != "none")
    block = settings.checkpoint == "block"
    kept = held(geometry, features, 0 if block else settings.hold)
    statistics = input.new_empty(Statistics.size(geometry), dtype=statistics_dtype(input.dtype))
    if settings.tail == "none":
        return buffer, statistics, kept
    if not block:
        kept.insert(0, buffer)
    if settings.tail == "transition":
        shape = (images, parameters[-1].shape[0], *halved(size))
        return empty_channels_last(shape, input), statistics, kept
    return input.new_empty(images, geometry.channels), statistics, kept


@nodes.node(f"(Tensor input, {_BLOCK}) -> (Tensor, Tensor, Tensor[])", _forward_fake)
def block_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `densenet_fast.blocks.forward.forward`."""
    return forward(input, _block(input.shape, input, args))


def _input_shape(anchor: Tensor, parameters: Tensors, settings: Settings) -> list[int]:
    shape = list(anchor.shape)
    if settings.checkpoint != "block":
        weights = parameters[5 : 6 * len(settings.dropout) : 6]
        shape[1] -= sum(weight.shape[0] for weight in weights if weight is not None)
    return shape


def _backward_fake(
    grad_output: Tensor,
    anchor: Tensor,
    statistics: Tensor,
    bottlenecks: list[Tensor],
    parameters: Tensors,
    *args: Any,
) -> list[Tensor]:
    _, _, *rest, (input_needed, *needs) = args
    shape = _input_shape(anchor, parameters, Settings(*rest))
    geometry = Geometry(shape, parameters, Settings(*rest))
    pitch = gradient_pitch(shape[1], geometry.channels, anchor)
    found = [empty_channels_last(shape, anchor, pitch)] if input_needed else []
    return found + nodes.wanted_like(parameters, needs)


@nodes.node(
    "(Tensor grad_output, Tensor anchor, Tensor statistics, Tensor[] bottlenecks, "
    f"{_BLOCK}, bool[] needs) -> Tensor[]",
    _backward_fake,
)
def block_backward(
    grad_output: Tensor, anchor: Tensor, statistics: Tensor, bottlenecks: list[Tensor], *args: Any
) -> list[Tensor]:
    """The gradients of the input and the parameters that `needs` asks for."""
    parameters, _, _, *rest, needs = args
    shape = _input_shape(anchor, parameters, Settings(*rest))
    block = _block(shape, anchor, args[:-1])
    found = gradients(block, anchor, statistics, bottlenecks, needs, grad_output)
    return nodes.wanted(found, [anchor, *parameters], needs)


class _DenseBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        link: Tensor | None,
        finish: Finish | None,
        seeds: Tensor | None,
        settings: Settings,
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        parameters, buffers = tensors[:count], tensors[count:]
        output, statistics, kept = block_forward(input, parameters, buffers, seeds, *settings)
        # The buffer is either the output itself or never leaves: in both cases the version counter
        # notices whoever writes into it before the backward has read it.
        if settings.checkpoint == "block":
            anchor = input
        elif settings.tail == "none":
            anchor = output
        else:
            anchor, *kept = kept
        if finish is not None:
            finish(statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(link, anchor, statistics, seeds, *kept, *tensors)
        ctx.kept, ctx.count, ctx.settings = len(kept), count, settings
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses a second reading
        _, anchor, statistics, seeds, *rest = saved
        kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
        parameters, buffers = tensors[: ctx.count], tensors[ctx.count :]
        needed = ctx.needs_input_grad
        needs = [needed[0], *needed[6 : 6 + ctx.count]]
        found = block_backward(
            grad_outputs[0],
            anchor,
            statistics,
            kept,
            parameters,
            buffers,
            seeds,
            *ctx.settings,
            needs,
        )
        found = nodes.spread(found, needs)
        behind = [grad_outputs[0], *saved]
        input, *others = nodes.first_order_only("a fused dense block", found, behind)
        return (input, None, None, None, None, None, *others, *[None] * len(buffers))


def backward_reads(output: Tensor) -> bool:
    """Whether `output` is a block's feature buffer, which its backward reads.

    In a graph it may be: Dynamo does not know where a tensor comes from.
    """
    if torch.compiler.is_compiling():
        return True
    node: Any = output.grad_fn
    fused = type(node) is _DenseBlock._backward_cls
    return fused and node.settings.tail == "none" and node.settings.checkpoint != "block"


def released(output: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`output` in this format, for others' code, which may write to it: never a feature buffer.

    Autograd would notice most writes, and not those through `.data` or a NumPy array.
    """
    known = (torch.contiguous_format, channels_last_format(output.dim()))
    if output.dim() < 3 or memory_format not in known:
        memory_format = torch.preserve_format
    if backward_reads(output):
        return output.clone(memory_format=memory_format)
    if memory_format is torch.preserve_format:
        return output
    return output.contiguous(memory_format=memory_format)
