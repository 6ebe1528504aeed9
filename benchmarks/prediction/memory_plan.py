"""Bytes that a training step keeps for its backward, and its peak, from sizes alone.

The peak follows the step through its moments and takes the fullest. It is what the step needs
beyond parameters, their gradients and images: what `benchmarks.memory` measures with gradients
allocated.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.networks import NetworkSpec
from benchmarks.prediction.common import LABEL, STATISTIC
from benchmarks.prediction.fused import row_splits, tap_splits
from benchmarks.prediction.shapes import Block, Format, blocks, held, stem
from benchmarks.prediction.usual import POOL_INDEX
from densenet_fast.specs import Checkpoint

NAIVE, EFFICIENT = "naive", "memory-efficient"
OURS: tuple[Checkpoint, ...] = ("none", "bottleneck", "block")
CACHE_PAGE, PADDING, CUDA_ACCESS = 4096, 16, 16  # densenet_fast.layout.row_pitch
LOSS_WEIGHT = 4  # bytes: the scalar that nll_loss keeps


def buffer(rows: int, channels: int, element: int, *, cuda: bool) -> int:
    """Bytes of a buffer of features, its rows padded as `row_pitch` pads them."""
    pitch = channels + (-channels % (CUDA_ACCESS // element) if cuda else 0)
    pitch += PADDING * (pitch * element % CACHE_PAGE == 0)
    return ((rows - 1) * pitch + channels) * element


def _norm(channels: int) -> int:
    return 2 * channels * STATISTIC


def head_kept(spec: NetworkSpec, fmt: Format) -> int:
    """Classifier's input, labels, log-probabilities, and the weight that autocast rounded."""
    n, c = spec.batch_size, blocks(spec)[-1].end
    rounded = c * spec.num_classes * fmt.element if fmt.casts else 0
    loss = n * (spec.num_classes * fmt.parameter + LABEL) + LOSS_WEIGHT
    return n * c * fmt.element + loss + rounded


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


def fused_block_kept(block: Block, fmt: Format, mode: str, hold: int, *, cuda: bool) -> int:
    """The features or the input, the bottlenecks, statistics, and a scalar's link to the input."""
    e = fmt.element
    if mode == "block":
        kept = block.rows * block.channels * e
    else:
        kept = buffer(block.rows, block.end, e, cuda=cuda)
    if mode != "block":
        kept += hold * block.rows * block.bottleneck * e
    return kept + _norm(block.end) + block.layers * _norm(block.bottleneck) + e


def fused_stem_kept(spec: NetworkSpec, fmt: Format, mode: str) -> int:
    """One byte for each pooled element, and without recomputation the convolution's output."""
    s, kept = stem(spec), 0
    if mode == "none" or not s.pooled_rows:
        kept += (s.image_elements + s.weights) * fmt.element * fmt.casts
    if s.pooled_rows:
        kept += s.pooled_rows * s.channels + _norm(s.channels)
        if mode == "none":
            kept += s.rows * s.channels * fmt.element
    return kept


def kept(spec: NetworkSpec, fmt: Format, name: str, *, cuda: bool = True) -> int:
    """Bytes that autograd keeps between forward and backward."""
    total = head_kept(spec, fmt)
    if name in OURS:
        total += fused_stem_kept(spec, fmt, name)
        holds = zip(blocks(spec), held(spec, fmt, name), strict=True)
        return total + sum(fused_block_kept(b, fmt, name, hold, cuda=cuda) for b, hold in holds)
    total += usual_stem_kept(spec, fmt)
    for block in blocks(spec):
        layers, tail = _usual_block_kept(block, fmt, efficient=name == EFFICIENT)
        total += sum(layers) + tail
    return total


def peak(spec: NetworkSpec, fmt: Format, name: str, multiprocessors: int | None) -> int:
    """Bytes of the step's fullest moment; `multiprocessors` None: on the CPU."""
    if name in OURS:
        return max(_fused_moments(spec, fmt, name, multiprocessors))
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


def _fused_moments(
    spec: NetworkSpec, fmt: Format, mode: Checkpoint, multiprocessors: int | None
) -> Iterator[int]:
    """The forward block by block, then the backward."""
    e, s, every, cuda = fmt.element, stem(spec), blocks(spec), multiprocessors is not None
    again = mode != "none"  # the convolution's output is scratch
    holds = held(spec, fmt, mode)
    now = fused_stem_kept(spec, fmt, mode)
    if s.pooled_rows:
        yield now + (s.rows * again + s.pooled_rows) * s.channels * e
    for block, hold in zip(every, holds, strict=True):
        features = buffer(block.rows, block.end, e, cuda=cuda)
        other = features if mode == "block" else block.rows * block.channels * e  # not kept
        now += fused_block_kept(block, fmt, mode, hold, cuda=cuda)
        bottleneck = block.rows * block.bottleneck * _scratch(block, mode, hold) * e
        yield now + other + max(bottleneck, (block.transition or 0) * block.pooled_rows * e)
    now += head_kept(spec, fmt)
    yield now + every[-1].end * spec.num_classes * fmt.parameter
    now -= head_kept(spec, fmt)
    for block, hold in reversed(list(zip(every, holds, strict=True))):
        m, b = block.rows, block.bottleneck
        features = buffer(m, block.end, e, cuda=cuda)
        live = now + (block.transition or 0) * block.pooled_rows * e  # and the gradient that came
        if mode == "block":
            live += features + hold * m * b * e
            yield live + m * b * e
        # The gradient buffer, and parameters' gradients, which stay until the block is done.
        live += features + block.weights * fmt.parameter
        scratch = m * (b * (1 + (hold < block.layers)) + block.growth) * e
        yield live + scratch + _workspace(block, fmt, multiprocessors)
        yield live + m * block.channels * e
        now -= fused_block_kept(block, fmt, mode, hold, cuda=cuda)
    if s.pooled_rows:
        yield now + (s.rows * (1 + again) + s.pooled_rows) * s.channels * e


def _scratch(block: Block, mode: Checkpoint, hold: int) -> bool:
    """Whether layers share a bottleneck in the forward, as those do that keep none."""
    return mode == "block" or hold < block.layers


def _workspace(block: Block, fmt: Format, multiprocessors: int | None) -> int:
    """The partial weight gradients of a block's largest product."""
    if multiprocessors is None:
        return 0
    c, b = block.start(block.layers - 1), block.bottleneck
    pointwise = row_splits(block.rows, b, c, fmt, multiprocessors) * b * c
    spatial = tap_splits(block, fmt, multiprocessors) * 9 * b * block.growth
    return max(pointwise, spatial) * STATISTIC
