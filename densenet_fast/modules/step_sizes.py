"""A network's planned steps as sizes: what `densenet_fast.blocks.memory_plan` computes with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise, repeat

import torch
from torch import Tensor, nn

from densenet_fast.blocks import stem_convolution
from densenet_fast.blocks.autocast import computed_type
from densenet_fast.blocks.forward import halved
from densenet_fast.blocks.memory_plan import (
    BlockSize,
    HeadSize,
    NetworkSize,
    Plan,
    StemSize,
    held_below_peak,
    statistics_bytes,
)
from densenet_fast.blocks.nodes import planned_shape
from densenet_fast.blocks.stem import in_place, pooled
from densenet_fast.modules import eligibility, input_checks
from densenet_fast.modules.dimensions import Conv, Transposed
from densenet_fast.modules.steps import (
    ConvStep,
    DenseStep,
    MaxTransitionStep,
    StemStep,
    Step,
)
from densenet_fast.operators.rows import row_pitch, rows_of
from densenet_fast.operators.torch_internals import GRADIENT_HOOKS

_LABEL = _SEED = 8  # bytes
_MOST_PARTS = 16  # of the CPU kernels' backward, each with a weight gradient of its own
_NARROW_VOLUME = 48  # channels
_NARROW, _WIDE = (32, 4), (128, _MOST_PARTS)  # least tiles of volumes, most parts
_LEAST_ROWS, _LEAST_TILES = 384, 64  # of a part: pixels, and Winograd's 2×2 tiles


_plans = lru_cache(64)(held_below_peak)  # of sizes alone: most steps are as the one before


def held_bottlenecks(planned: Sequence[Step], input: Tensor) -> Iterator[int]:
    """How many bottlenecks each block holds: some if there is nothing here but fused blocks."""
    steps = [step for step in planned if isinstance(step, DenseStep)]
    if len(steps) < len(planned) or all(step.checkpoint == "none" for step in steps):
        return repeat(0)
    stored = computed_type(input.dtype, input.device.type)
    sizes = _block_sizes(steps, planned_shape(input.shape), stored.itemsize)
    if sizes is None or not (input.requires_grad or _trainable(steps[0])):
        return repeat(0)  # in a frozen block the fullest backward may not happen
    network = NetworkSize(StemSize(), tuple(sizes), HeadSize())
    modes = tuple(step.checkpoint for step in steps)
    # Dynamo traces through caches, and says so.
    plan = held_below_peak if torch.compiler.is_compiling() else _plans
    plans = plan(network, modes)
    return iter([plan.hold for plan in plans])


def network_size(
    steps: Sequence[Step],
    classifier: nn.Linear,
    shape: Sequence[int],
    stored: torch.dtype,
    device: torch.device,
) -> NetworkSize | None:
    """Sizes of a step of whole fused blocks on images of `shape` [N, C, *size].

    Features are `stored` in that type; parameters of another one are cast as autocast does it.
    Cross entropy is taken for the loss. None where anything in the network does not run fused.
    """
    blocks = [step for step in steps if isinstance(step, DenseStep)]
    before = list(steps[: len(steps) - len(blocks)])
    if not blocks or any(isinstance(step, DenseStep) for step in before):
        return None
    stem = _stem(before, shape, stored, device)
    if stem is None:
        return None
    sizes = _block_sizes(blocks, stem[1], stored.itemsize)
    if sizes is None:
        return None
    sizes = [
        replace(
            size,
            pitch=row_pitch(size.end, stored.itemsize, cuda=device.type == "cuda"),
            workspace=cpu_workspace(size) if device.type == "cpu" else 0,
        )
        for size in sizes
    ]
    head = _head(classifier, shape[0], stored)
    pooled = shape[0] * sizes[-1].end * stored.itemsize
    return NetworkSize(stem[0], sizes, replace(head, kept=head.kept + pooled))


def segmentation_size(
    down: Sequence[Step],
    up: Sequence[tuple[Transposed, Step]],
    classifier: Conv,
    shape: Sequence[int],
    stored: torch.dtype,
    device: torch.device,
) -> NetworkSize | None:
    """Sizes of a step of a network with a way down and up, likewise.

    `up` are its blocks with the transposed convolutions before them, which PyTorch computes.
    """
    stem = _stem(down[:1], shape, stored, device)
    if stem is None:
        return None
    images, channels, *size = stem[1]
    itemsize, sizes = stored.itemsize, list[BlockSize]()
    skips: list[tuple[int, list[int]]] = []  # channels, and the images' size
    for step in down[1:]:
        if isinstance(step, MaxTransitionStep) and len(sizes) > len(skips):
            skips.append((sizes[-1].end, size))
            channels, size = eligibility.weight_shape(step.conv)[0], halved(size)
            sizes[-1] = _with_maximum(sizes[-1], step, math.prod(size) * images, device)
            continue
        found = _block_sizes([step], (images, channels, *size), itemsize)
        if found is None or len(sizes) > len(skips):
            return None
        sizes += found
    for (transposed, step), (skip, larger) in zip(up, reversed(skips), strict=True):
        sizes[-1] = _with_transposed(sizes[-1], transposed, (images, *size), stored)
        channels, size = transposed.out_channels + skip, larger
        found = _block_sizes([step], (images, channels, *size), itemsize)
        if found is None:
            return None
        sizes += found
    # The gradient of the input of a block on the way up has that of the skip in it, and stays until
    # the block on the way down has taken that.
    levels = len(skips)
    above = reversed(sizes[levels + 1 :])
    skipping = [block.input_gradient * itemsize for block in above]
    waiting = [0, *accumulate(skipping)]
    for at, block in enumerate(sizes):
        transition = block.transition
        if at < levels:
            transition += skipping[at] + sizes[at + 1].input_gradient * itemsize
        sizes[at] = replace(
            block,
            returned=True,
            workspace=cpu_workspace(block) if device.type == "cpu" else 0,
            transition=transition,
            waiting=waiting[min(at, 2 * levels - at)],
        )
    return NetworkSize(stem[0], sizes, _pixels_head(classifier, (images, *size), sizes[-1], stored))


def _with_maximum(
    block: BlockSize, step: MaxTransitionStep, pixels: int, device: torch.device
) -> BlockSize:
    """The block with a transition behind it whose output has so many pixels."""
    outputs, read, *_ = eligibility.weight_shape(step.conv)
    weights, lasting = _gradient_bytes([step.conv.weight])
    kept = pixels * outputs + statistics_bytes(read, block.itemsize) + _SEED * (step.dropout > 0)
    backward = block.pixels * (outputs + read) * block.itemsize + weights
    if device.type == "cpu":
        backward += _pointwise(block.pixels, read, outputs) * max(4, block.itemsize)
    return replace(
        block,
        weights=block.weights + weights,
        lasting=block.lasting + lasting,
        beside=block.beside + kept,
        transition=backward,
    )


def _with_transposed(
    block: BlockSize, conv: Transposed, pixels: Sequence[int], stored: torch.dtype
) -> BlockSize:
    """The block with a transposed convolution behind it, of a part of its features."""
    images, *size = pixels
    weights, lasting = _gradient_bytes([conv.weight])
    rounded = conv.weight.numel() * stored.itemsize if conv.weight.dtype != stored else 0
    edges = zip(size, conv.stride, conv.kernel_size, strict=True)
    larger = math.prod((n - 1) * stride + taps for n, stride, taps in edges)
    written = images * larger * conv.out_channels
    # PyTorch has both, and the weight, in other layouts too.
    copied = 2 * (written + block.pixels * conv.in_channels) * stored.itemsize
    return replace(
        block,
        weights=block.weights + weights,
        lasting=block.lasting + lasting,
        beside=block.beside + rounded,
        transition=copied + 4 * conv.weight.numel() * stored.itemsize,
    )


def _block_sizes(
    steps: Sequence[Step], shape: Sequence[int], itemsize: int
) -> list[BlockSize] | None:
    """Sizes of blocks behind one another, the first one's input [N, C, *size] being `shape`.

    None where some layer is not fused. `itemsize` is that of a feature, in bytes.
    """
    images, channels, *size = shape
    sizes: list[BlockSize] = []
    for step in steps:
        if not isinstance(step, DenseStep):
            return None
        layers = step.segments[0] if len(step.segments) == 1 else None
        if not isinstance(layers, list):
            return None
        widths = [layer.width for layer in layers]
        growths = [eligibility.weight_shape(layer.conv2)[0] for layer in layers]
        convolutions = [conv for layer in layers for conv in layer.convolutions]
        end, pixels = channels + sum(growths), images * math.prod(size)
        if step.tail is not None and step.tail.conv is not None:
            behind = eligibility.weight_shape(step.tail.conv)[0]
            convolutions.append(step.tail.conv)
            size = halved(size)
            output = images * math.prod(size) * behind
        else:
            behind, output = end, images * end if step.tail is not None else pixels * end
        weights, lasting = _gradient_bytes([conv.weight for conv in convolutions])
        sizes.append(
            BlockSize(
                pixels,
                channels,
                end,
                tuple(widths),
                max(growths),
                output,
                itemsize,
                weights,
                lasting,
                taps=3 ** len(size),
                beside=_SEED * sum(layer.dropout > 0 for layer in layers),
            )
        )
        channels = behind
    return [
        *(replace(size, gradient=following.input_gradient) for size, following in pairwise(sizes)),
        sizes[-1],
    ]


def _gradient_bytes(weights: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes of the weights' gradients, and of those that are new and stay."""
    wanted = [weight for weight in weights if weight.requires_grad]
    if torch.compiler.is_compiling():  # a graph hands over all its gradients when it is done
        return (sum(weight.nbytes for weight in wanted),) * 2
    lasting = [
        weight
        for weight in wanted
        if weight.is_leaf and weight.grad is None and not getattr(weight, GRADIENT_HOOKS, None)
    ]
    return sum(weight.nbytes for weight in wanted), sum(weight.nbytes for weight in lasting)


def _trainable(step: DenseStep) -> bool:
    layers = step.segments[0]
    assert isinstance(layers, list)
    return any(
        parameter.requires_grad
        for layer in layers
        for part in (*layer.norms, *layer.convolutions)
        for parameter in part.parameters()
    )


def apply_plans(planned: Sequence[Step], plans: Sequence[Plan]) -> list[Step]:
    """The steps with each block's mode and held bottlenecks as planned."""
    applied: list[Step] = []
    blocks = iter(plans)
    keep_stem = bool(plans) and plans[0].mode == "none"
    for step in planned:
        if isinstance(step, DenseStep):
            mode, hold = next(blocks)
            step = replace(step, checkpoint=mode, hold=hold)
        elif isinstance(step, StemStep) and step.conv is not None and keep_stem:
            applied.append(ConvStep(step.conv))
            step = StemStep(step.norm)
        applied.append(step)
    return applied


def _stem(
    steps: Sequence[Step], shape: Sequence[int], stored: torch.dtype, device: torch.device
) -> tuple[StemSize, Sequence[int]] | None:
    """The stem's sizes, and the shape behind it."""
    first = steps[0] if steps else None
    conv = first.module if isinstance(first, ConvStep) else None
    norm = steps[-1] if steps and isinstance(steps[-1], StemStep) else None
    if norm is not None and conv is None:
        conv = norm.conv
    if conv is None or len(steps) != 1 + (norm is not None and norm.conv is None):
        return None
    images, channels, *before = shape
    size = input_checks.output_size(conv, before)
    if size is None:
        return None
    weights, lasting = _gradient_bytes([conv.weight])
    e, out = stored.itemsize, conv.out_channels
    image, pixels = channels * math.prod(before), math.prod(size) * out
    copies, computed = 0, stored
    own = stem_convolution.has_kernel(shape, conv, conv.weight, conv.bias, stored, device)
    if own:
        wide = stem_convolution.workspace(conv, images * size[0], e)
    else:
        computed = stem_convolution.fast_type(stored, device, conv.weight.dim() - 2)
        wide = stem_convolution.columns(conv, images, size, stored, device)
    if {conv.weight.dtype, computed} != {stored}:
        copies = (images * image + conv.weight.numel()) * computed.itemsize
    elif not own and not rows_of(conv.weight).is_contiguous():
        copies = conv.weight.numel() * e
    if norm is None:
        if computed != stored:
            wide = images * pixels * computed.itemsize
        stem = StemSize(copies=copies, wide=wide, weights=weights, lasting=lasting)
        return stem, (images, out, *size)
    if computed != stored:
        at_once = images if norm.conv is None else stem_convolution.wide_images(images)
        wide = at_once * (image + pixels) * computed.itemsize
    behind = pooled(size)
    elements = images * math.prod(behind) * out
    stem = StemSize(
        features=images * pixels * e,
        pooled=elements * e,
        positions=elements,
        statistics=statistics_bytes(out, e),
        copies=copies,
        wide=wide,
        recomputable=norm.conv is not None,
        in_place=in_place(device, synchronised=isinstance(norm.norm, nn.SyncBatchNorm)),
        weights=weights,
        lasting=lasting,
    )
    return stem, (images, out, *behind)


def _head(classifier: nn.Linear | Conv, labels: int, stored: torch.dtype) -> HeadSize:
    """The classifier's weight where autocast rounds it, and what cross entropy keeps."""
    parameter = classifier.weight
    rounded = parameter.numel() * stored.itemsize if parameter.dtype != stored else 0
    loss = labels * (len(parameter) * parameter.itemsize + _LABEL) + parameter.itemsize
    return HeadSize(loss + rounded, *_gradient_bytes([parameter]))


def _pixels_head(
    classifier: Conv, pixels: Sequence[int], behind: BlockSize, stored: torch.dtype
) -> HeadSize:
    """A classifier of pixels, a convolution by PyTorch, which reads a block's features."""
    count = math.prod(pixels)
    head = _head(classifier, count, stored)
    scores = count * classifier.out_channels * max(4, stored.itemsize)
    copies = 0.0  # of features with channels innermost, which PyTorch takes as images alone
    if len(pixels) == 4:
        copies = 1
    elif len(pixels) == 2:  # contiguous, and reordered by oneDNN, or once more for each thread
        reordered = stored == torch.bfloat16
        copies = 2 if reordered else 1 + min(1, torch.get_num_threads() / pixels[0])
    convolution = scores + int((1 + copies) * behind.buffer) - head.kept
    return replace(head, scratch=head.scratch + max(2 * scores, convolution))


def cpu_workspace(block: BlockSize) -> int:
    """The CPU kernels' packed weights and partial gradients, as product_backward.h cuts them.

    Or Winograd's, in tiles of 2×2 pixels, of volumes 4×4, scratch where there is but one part.
    """
    pointwise = _pointwise(block.pixels, block.end - block.growth, max(block.widths, default=0))
    spatial = 0
    for read in {read for _, read in block.reads}:
        parts, packed = _parts(block.pixels, _LEAST_ROWS), block.taps
        if block.taps == 9:
            parts, packed = _parts(block.pixels // 4, _LEAST_TILES), 16
        elif block.taps == 27:
            parts = _parts(block.pixels // 16, *(_NARROW if read <= _NARROW_VOLUME else _WIDE))
            packed = 108
        if parts > 1 or block.taps == 3:
            spatial = max(spatial, (parts * block.taps + packed) * read * block.growth)
    return max(pointwise, spatial) * max(4, block.itemsize)


def _pointwise(pixels: int, read: int, outputs: int) -> int:
    """Elements of that of a 1×1 convolution."""
    return (_parts(pixels, _LEAST_ROWS) + 1) * read * outputs


def _parts(total: int, least: int, most: int = _MOST_PARTS) -> int:
    return max(1, min(most, total // least))
