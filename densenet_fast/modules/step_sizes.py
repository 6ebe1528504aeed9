"""A network's planned steps as sizes: what `densenet_fast.blocks.memory_plan` computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from densenet_fast.blocks import stem_convolution
from densenet_fast.blocks.memory_plan import (
    BlockSize,
    HeadSize,
    NetworkSize,
    StemSize,
    statistics_bytes,
)
from densenet_fast.modules import image_sizes
from densenet_fast.modules.fusing import block_sizes, gradient_bytes
from densenet_fast.modules.steps import ConvStep, DenseStep, StemStep, Step
from densenet_fast.operators.rows import row_pitch

_LABEL = 8  # bytes
_MOST_PARTS = 16  # of the CPU kernels' backward, each with a weight gradient of its own
_LEAST_ROWS, _LEAST_TILES = 384, 64  # of a part: pixels, and Winograd's 2×2 tiles


def network_size(
    steps: Sequence[Step],
    classifier: nn.Linear,
    shape: Sequence[int],
    stored: torch.dtype,
    device: torch.device,
) -> NetworkSize | None:
    """Sizes of a step of whole fused blocks on images of `shape` [N, C, H, W].

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
    sizes = block_sizes(blocks, stem[1], stored.itemsize)
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
    return NetworkSize(stem[0], sizes, _head(classifier, shape[0], sizes[-1].end, stored))


def _stem(
    steps: Sequence[Step], shape: Sequence[int], stored: torch.dtype, device: torch.device
) -> tuple[StemSize, tuple[int, int, int, int]] | None:
    """The stem's sizes, and the shape behind it."""
    first = steps[0] if steps else None
    conv = first.module if isinstance(first, ConvStep) else None
    norm = steps[-1] if steps and isinstance(steps[-1], StemStep) else None
    if norm is not None and conv is None:
        conv = norm.conv
    if conv is None or len(steps) != 1 + (norm is not None and norm.conv is None):
        return None
    images, channels, height, width = shape
    size = image_sizes.output_size(conv, (height, width))
    if size is None:
        return None
    weights, lasting = gradient_bytes([conv.weight])
    e, out = stored.itemsize, conv.out_channels
    image, pixels = channels * height * width, size[0] * size[1] * out
    computed = stem_convolution.fast_type(stored, device)
    copies, wide = 0, stem_convolution.columns(conv, images, size, stored, device)
    if conv.weight.dtype != stored:
        copies = (images * image + conv.weight.numel()) * computed.itemsize
    elif not conv.weight.is_contiguous(memory_format=torch.channels_last):
        copies = conv.weight.numel() * e
    if norm is None:
        if computed != stored:
            wide = images * pixels * computed.itemsize
        stem = StemSize(copies=copies, wide=wide, weights=weights, lasting=lasting)
        return stem, (images, out, *size)
    if computed != stored:
        at_once = images if norm.conv is None else stem_convolution.wide_images(images)
        wide = at_once * (image + pixels) * computed.itemsize
    pooled = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    elements = images * pooled[0] * pooled[1] * out
    stem = StemSize(
        features=images * pixels * e,
        pooled=elements * e,
        positions=elements,
        statistics=statistics_bytes(out, e),
        copies=copies,
        wide=wide,
        recomputable=norm.conv is not None,
        weights=weights,
        lasting=lasting,
    )
    return stem, (images, out, *pooled)


def _head(classifier: nn.Linear, images: int, channels: int, stored: torch.dtype) -> HeadSize:
    """The classifier's input, its weight where autocast rounds it, and what cross entropy keeps."""
    parameter = classifier.weight
    rounded = parameter.numel() * stored.itemsize if parameter.dtype != stored else 0
    loss = images * (classifier.out_features * parameter.itemsize + _LABEL) + parameter.itemsize
    kept = images * channels * stored.itemsize + loss + rounded
    return HeadSize(kept, *gradient_bytes([parameter]))


def cpu_workspace(block: BlockSize) -> int:
    """The CPU kernels' partial weight gradients, as csrc/cpu/product_backward.h cuts them."""
    widest = max(block.widths, default=0)
    pointwise = _parts(block.pixels, _LEAST_ROWS) * widest * (block.end - block.growth)
    spatial = _parts(block.pixels // 4, _LEAST_TILES) * 9 * widest * block.growth
    return max(pointwise, spatial) * max(4, block.itemsize)


def _parts(total: int, least: int) -> int:
    return max(1, min(_MOST_PARTS, total // least))
