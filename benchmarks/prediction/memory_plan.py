"""Bytes that a training step keeps for its backward, and its peak, from sizes alone.

The peak follows the step through its moments and takes the fullest. It is what the step needs
beyond parameters, their gradients and images: what `benchmarks.memory` measures with gradients
allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.networks import NetworkSpec
from benchmarks.prediction.common import STATISTIC
from benchmarks.prediction.fused import packed, row_splits, tap_splits
from benchmarks.prediction.shapes import (
    Block,
    Format,
    blocks,
    fused_network,
    head_kept,
    plans,
    stem,
)
from benchmarks.prediction.usual import POOL_INDEX
from densenet_fast.blocks.memory_plan import BlockSize, NetworkSize
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.step_sizes import cpu_workspace

NAIVE, EFFICIENT = "naive", "memory-efficient"
OURS: tuple[Checkpoint, ...] = ("none", "bottleneck", "block")
# The suites' peers, as they are called here.
IMPLEMENTATIONS: dict[str, str] = {
    "naive-channels-last": NAIVE,
    "memory-efficient": EFFICIENT,
    **{f"ours-{mode}": mode for mode in OURS},
}


def _norm(channels: int) -> int:
    return 2 * channels * STATISTIC


def usual_layer_kept(block: Block, layer: int, fmt: Format, *, efficient: bool) -> int:
    """Both norms' inputs and ReLU's results; `efficient`: norm2's, and the layer's own output."""
    m, c, b = block.rows, block.start(layer), block.bottleneck
    rounded = block.layer_weights(layer) * fmt.element if fmt.casts else 0
    if efficient:
        rounded = 9 * b * block.growth * fmt.element * fmt.casts  # conv1's is made again
        # The last layer's output goes into the block's concatenation alone.
        growth = block.growth if layer + 1 < block.layers else 0
        return m * (2 * b + growth) * fmt.element + _norm(b) + rounded
    return 2 * m * (c + b) * fmt.element + _norm(c) + _norm(b) + rounded


def _usual_block_kept(block: Block, fmt: Format, *, efficient: bool) -> tuple[list[int], int]:
    """The layers' bytes, and those of what follows; a checkpointed block keeps its input."""
    layers = [usual_layer_kept(block, i, fmt, efficient=efficient) for i in range(block.layers)]
    if efficient:
        layers[0] += block.rows * block.channels * fmt.element
    tail = 2 * block.rows * block.end * fmt.element + _norm(block.end)
    if block.transition is not None:
        tail += block.rows * block.transition * fmt.element  # the pooling's input
        tail += block.end * block.transition * fmt.element * fmt.casts
    return layers, tail


def usual_stem_kept(spec: NetworkSpec, fmt: Format) -> int:
    """The norm's input, ReLU's result and the pooling's positions."""
    s = stem(spec)
    kept = (s.image_elements + s.weights) * fmt.element if fmt.casts else 0
    if s.pooled_rows:
        kept += 2 * s.rows * s.channels * fmt.element + _norm(s.channels)
        kept += s.pooled_rows * s.channels * POOL_INDEX
    return kept


def kept(spec: NetworkSpec, fmt: Format, name: str, *, cuda: bool = True) -> int:
    """Bytes that autograd keeps between forward and backward."""
    if name in OURS:
        network = fused_network(spec, fmt, cuda=cuda)
        return network.kept(plans(network, name))
    total = head_kept(spec, fmt) + usual_stem_kept(spec, fmt)
    for block in blocks(spec):
        layers, tail = _usual_block_kept(block, fmt, efficient=name == EFFICIENT)
        total += sum(layers) + tail
    return total


def peak(spec: NetworkSpec, fmt: Format, name: str, multiprocessors: int | None) -> int:
    """Bytes of the step's fullest moment; `multiprocessors` None: on the CPU."""
    if name in OURS:
        network = _with_workspace(spec, fmt, multiprocessors)
        return network.peak(plans(network, name))
    return max(_usual_moments(spec, fmt, name))


def _usual_moments(spec: NetworkSpec, fmt: Format, name: str) -> Iterator[int]:
    """From the last block to the first; what a node kept is free when it is done."""
    e, s = fmt.element, stem(spec)
    now = kept(spec, fmt, name)
    yield now + blocks(spec)[-1].end * spec.num_classes * fmt.parameter  # the classifier's gradient
    now -= head_kept(spec, fmt)
    for block in reversed(blocks(spec)):
        size, m, out = block.rows * block.end * e, block.rows, block.transition or 0
        layers, tail = _usual_block_kept(block, fmt, efficient=name == EFFICIENT)
        yield now + (block.pooled_rows + m) * out * e
        yield now + 2 * size  # ReLU's result and its gradient
        now -= tail
        yield now + 3 * size  # norm's input, the gradient of its output, and its own
        for layer in reversed(range(block.layers)):
            read = m * block.start(layer) * e
            gradients = read + m * block.growth * e  # of the features so far
            yield now + gradients + 2 * m * block.bottleneck * e
            now -= layers[layer]
            yield now + gradients + 3 * read  # the same at norm1
    if s.pooled_rows:
        features = s.rows * s.channels * e
        yield now + s.pooled_rows * s.channels * e + features
        yield now + 2 * features


def _with_workspace(spec: NetworkSpec, fmt: Format, multiprocessors: int | None) -> NetworkSize:
    """The network with its kernels' partial weight gradients and packed weights."""
    cuda = multiprocessors is not None
    network = fused_network(spec, fmt, cuda=cuda)
    sizes = [
        replace(size, workspace=_workspace(block, size, fmt, multiprocessors))
        for block, size in zip(blocks(spec), network.blocks, strict=True)
    ]
    return replace(network, blocks=sizes)


def _workspace(block: Block, size: BlockSize, fmt: Format, multiprocessors: int | None) -> int:
    """The partial weight gradients of a block's largest layer, and the packed weights of all."""
    if multiprocessors is None:
        return cpu_workspace(size)
    c, b, k = block.start(block.layers - 1), block.bottleneck, block.growth
    pointwise = row_splits(block.rows, b, c, fmt, multiprocessors) * b * c
    spatial = tap_splits(block, fmt, multiprocessors) * 9 * b * k
    weights = 0
    for layer in range(block.layers):  # of the gradients, and of the bottleneck made again
        c = block.start(layer)
        weights += packed(c, b, 1, fmt) + packed(b, k, 9, fmt) + packed(b, c, 1, fmt)
    return (pointwise + spatial) * STATISTIC + weights
