"""Our network, operation by operation, as the CUDA kernels in csrc/cuda run it.

Against us: a product whose output is wider than its tile sweeps its operand once for each column
of tiles, and every sweep counts as read from memory, although the L2 cache may hold it. A tile's
border in a 3×3 convolution does not count: its neighbours, which read it too, run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.networks import NetworkSpec
from benchmarks.prediction.common import STATISTIC, ceil_div, conv0_backward, conv0_forward, head
from benchmarks.prediction.shapes import (
    Block,
    Format,
    Op,
    Phase,
    blocks,
    fused_network,
    plans,
    stem,
)
from densenet_fast.blocks.specs import Checkpoint

# Numbers of csrc/cuda: kUnitRows, the widest tiles of kRowsTiles and of the others, kStep in bytes,
# kLeastSteps, kStatisticsRows and kUnpoolRows, TapTile, kStagePixels, kTableSize. Partial results
# are counted for tiles of kUnitRows, though small images have smaller ones.
TILE_ROWS = 128
TILE_COLUMNS = 128
NARROW_COLUMNS = 64
STEP_BYTES = 64
LEAST_STEPS = 4
REDUCED_ROWS = 256
TAP_OUTPUTS, TAP_ROW_BYTES = 32, 128
STAGE_PIXELS = 32
TABLE_SIZE = 48  # norms, counters or weights of one launch
TILE_SHAPES = ((1, 8, 16), (1, 16, 8), (1, 4, 32), (2, 8, 8), (1, 32, 4))


def product(
    name: str,
    phase: Phase,
    *,
    operand: int,
    sweeps: int = 1,
    others: int = 0,
    result: int,
    weight: int = 0,
    partial: int = 0,
    flops: int,
    launches: int,
) -> Op:
    """A product of ours. All sizes are in bytes: `operand` is read `sweeps` times, `weight` is a
    packed one, and `partial` results are written and read again.
    """
    return Op(
        name,
        phase,
        operand * sweeps + others + weight + partial,
        result + weight + partial,
        flops,
        launches,
        ours=True,
        repeated=operand * (sweeps - 1) + 2 * weight + 2 * partial,
    )


def packed(columns: int, channels: int, taps: int, fmt: Format) -> int:
    """Bytes of a weight rearranged for a product."""
    return columns * taps * steps(channels, fmt) * STEP_BYTES


def steps(channels: int, fmt: Format) -> int:
    """Steps of a reduction over channels."""
    return ceil_div(channels, STEP_BYTES // fmt.element)


def reduction_splits(blocks: int, steps: int, least: int) -> int:
    """Parts of a forward product's reduction (`reduction_splits`)."""
    splits = min(128 // blocks, steps // least)
    return 1 if splits <= 1 else ceil_div(steps, ceil_div(steps, splits))


def split_rows(splits: int, rows: int, outputs: int) -> int:
    """Bytes of a product's parts; none of a whole one."""
    return splits * rows * outputs * STATISTIC if splits > 1 else 0


def partials(tiles: int, channels: int) -> int:
    """Bytes of two numbers of each channel of each tile: written by a product, then merged."""
    return 2 * tiles * channels * STATISTIC


def tiles_3x3(block: Block) -> int:
    """Tiles of 128 pixels that cover the images of a block best (`best_shape`)."""
    return min(
        ceil_div(block.images, n) * ceil_div(block.size, h) * ceil_div(block.size, w)
        for n, h, w in TILE_SHAPES
    )


def unit_splits(units: int, tiles: int, multiprocessors: int) -> int:
    """Parts of a weight gradient's sum over units of pixels (`PixelCut`)."""
    wanted = min(ceil_div(2 * multiprocessors, tiles), units)
    return ceil_div(units, ceil_div(units, wanted))


def fills(blocks: int, multiprocessors: int) -> bool:
    """Whether so many blocks are taken for filling a device."""
    return 4 * blocks >= 3 * multiprocessors


def row_splits(rows: int, out: int, channels: int, fmt: Format, multiprocessors: int) -> int:
    """Parts of a 1×1 weight gradient's rows (`run_pixel_gradient`)."""
    units = ceil_div(rows, STAGE_PIXELS)
    if fmt.element == 2 and out > 64:
        tiles = ceil_div(out, 128) * ceil_div(channels, 128)
        splits = unit_splits(units, tiles, multiprocessors)
        if fills(tiles * splits, multiprocessors):
            return splits
    tiles = ceil_div(out, 64) * ceil_div(channels, 128 if fmt.element == 2 else 64)
    return unit_splits(units, tiles, multiprocessors)


def tap_splits(block: Block, fmt: Format, multiprocessors: int) -> int:
    """Parts of a 3×3 weight gradient's tiles (`run_tap_gradient`)."""
    across = ceil_div(block.growth, TAP_OUTPUTS)
    tiles = across * ceil_div(block.bottleneck, TAP_ROW_BYTES // fmt.element)
    units = tiles_3x3(block)
    splits = unit_splits(units, tiles, multiprocessors)
    if fills(tiles * splits, multiprocessors):
        return splits
    return unit_splits(4 * units, tiles, multiprocessors)


def conv1x1_forward(
    rows: int, channels: int, outputs: int, fmt: Format, *, again: bool = False
) -> Op:
    """The bottleneck from the features; `again`: recomputed, without statistics."""
    blocks = ceil_div(rows, 64) * ceil_div(outputs, 64)
    splits = reduction_splits(blocks, steps(channels, fmt), LEAST_STEPS)
    return product(
        *_forward_name("conv1x1", again),
        operand=rows * channels * fmt.element,
        sweeps=ceil_div(outputs, TILE_COLUMNS),
        result=rows * outputs * fmt.element,
        others=outputs * channels * fmt.parameter,
        weight=packed(outputs, channels, 1, fmt),
        partial=split_rows(splits, rows, outputs)
        + (0 if again else partials(ceil_div(rows, TILE_ROWS), outputs)),
        flops=2 * rows * channels * outputs,
        launches=(1 if again else 2) + (splits > 1),
    )


def conv3x3_forward(block: Block, fmt: Format, *, again: bool = False) -> Op:
    """The growth from the bottleneck, into its place among the features."""
    m, b, k, e = block.rows, block.bottleneck, block.growth, fmt.element
    blocks = 2 * tiles_3x3(block) * ceil_div(k, 64)
    splits = reduction_splits(blocks, steps(b, fmt), 1)
    return product(
        *_forward_name("conv3x3", again),
        operand=m * b * e,
        sweeps=ceil_div(k, NARROW_COLUMNS),
        result=m * k * e,
        others=9 * b * k * fmt.parameter,
        weight=packed(k, b, 9, fmt),
        partial=split_rows(splits, m, k) + (0 if again else partials(tiles_3x3(block), k)),
        flops=18 * m * b * k,
        launches=(1 if again else 2) + (splits > 1),
    )


def _forward_name(name: str, again: bool) -> tuple[str, Phase]:
    return (f"{name} recomputed", "backward") if again else (f"{name} forward", "forward")


def conv3x3_backward(block: Block, fmt: Format, multiprocessors: int) -> list[Op]:
    """Through the 3×3 convolution, ReLU and norm2's sums."""
    m, b, k, e = block.rows, block.bottleneck, block.growth, fmt.element
    weights = 9 * b * k
    return [
        product(
            "conv3x3 dgrad",
            "backward",
            operand=m * k * e,
            sweeps=ceil_div(b, TILE_COLUMNS),
            others=m * b * e + weights * fmt.parameter,
            result=m * b * e,
            weight=packed(b, k, 9, fmt),
            partial=partials(tiles_3x3(block), b),
            flops=2 * m * weights,
            launches=2,
        ),
        product(
            "conv3x3 wgrad",
            "backward",
            operand=m * (b + k) * e,
            result=weights * fmt.parameter,
            partial=tap_splits(block, fmt, multiprocessors) * weights * STATISTIC,
            flops=2 * m * weights,
            launches=1,
        ),
    ]


def conv1x1_backward(
    rows: int, channels: int, outputs: int, fmt: Format, multiprocessors: int
) -> list[Op]:
    """Through norm2, the 1×1 convolution, ReLU and norm1, added to the gradient buffer."""
    e, weights = fmt.element, outputs * channels
    operand = 2 * rows * outputs * e  # norm2's gradient and the bottleneck
    splits = row_splits(rows, outputs, channels, fmt, multiprocessors)
    return [
        product(
            "conv1x1 dgrad",
            "backward",
            operand=operand,
            sweeps=ceil_div(channels, TILE_COLUMNS),
            others=2 * rows * channels * e + weights * fmt.parameter,
            result=rows * channels * e,
            weight=packed(channels, outputs, 1, fmt),
            partial=partials(ceil_div(rows, TILE_ROWS), channels),
            flops=2 * rows * weights,
            launches=2,
        ),
        product(
            "conv1x1 wgrad",
            "backward",
            operand=operand + rows * channels * e,
            result=weights * fmt.parameter,
            partial=splits * weights * STATISTIC,
            flops=2 * rows * weights,
            launches=2,  # and the splits of both weight gradients
        ),
    ]


def finish_gradient(name: str, elements: int, fmt: Format) -> Op:
    """The deferred correction: features and gradient in, complete gradient out."""
    return Op(name, "backward", 2 * elements * fmt.element, elements * fmt.element)


def vectors(name: str, phase: Phase, channels: int, read: int, written: int, launches: int) -> Op:
    """Work on a norm's vectors."""
    size = channels * STATISTIC
    return Op(name, phase, read * size, written * size, launches=launches)


def coefficients(phase: Phase, channels: int, launches: int = 0) -> Op:
    """A norm's scale, shift and reciprocal deviation; in a block made with others or with sums."""
    return vectors("norm coefficients", phase, channels, 4, 3, launches)


def running_statistics(norms: int, channels: int) -> Op:
    """The running statistics and counters of a node's norms."""
    launches = 2 * ceil_div(norms, TABLE_SIZE)
    return vectors("running statistics", "forward", channels, 4, 2, launches)


def at_once(phase: Phase, norms: int, weights: int) -> Op:
    """What a block begins with: norms whose statistics are there, and packed weights."""
    launches = ceil_div(norms, TABLE_SIZE) + ceil_div(weights, TABLE_SIZE)
    return Op("coefficients and packed weights", phase, 0, 0, launches=launches)


def channel_statistics(rows: int, channels: int, fmt: Format) -> Op:
    """Statistics of features that no kernel of ours has written."""
    sums = partials(ceil_div(rows, REDUCED_ROWS), channels)
    return Op("statistics", "forward", rows * channels * fmt.element + sums, sums, launches=2)


def layer_forward(block: Block, layer: int, fmt: Format) -> Iterator[Op]:
    """A layer for the first time. Nobody normalises with a norm behind the last layer's growth but
    the tail, which every block of a network has.
    """
    c, b = block.start(layer), block.bottleneck
    yield coefficients("forward", c)
    yield conv1x1_forward(block.rows, c, b, fmt)
    yield coefficients("forward", b)
    yield conv3x3_forward(block, fmt)


def layer_again(block: Block, layer: int, fmt: Format) -> Iterator[Op]:
    """A layer of a block that kept its input alone."""
    yield coefficients("backward", block.start(layer))
    yield conv1x1_forward(block.rows, block.start(layer), block.bottleneck, fmt, again=True)
    yield coefficients("backward", block.bottleneck)
    yield conv3x3_forward(block, fmt, again=True)


def layer_backward(
    block: Block, layer: int, fmt: Format, multiprocessors: int, *, recompute: bool
) -> Iterator[Op]:
    """A layer's backward; `recompute` makes its bottleneck again."""
    m, c, b = block.rows, block.start(layer), block.bottleneck
    yield coefficients("backward", c)
    yield coefficients("backward", b)
    if recompute:
        yield conv1x1_forward(m, c, b, fmt, again=True)
    yield finish_gradient("deferred correction", m * block.growth, fmt)
    yield from conv3x3_backward(block, fmt, multiprocessors)
    yield vectors("norm2 gradient coefficients", "backward", b, 5, 3, 0)
    yield from conv1x1_backward(m, c, b, fmt, multiprocessors)
    yield vectors("norm1 deferred sums", "backward", c, 6, 2, 0)


def _tail(block: Block, fmt: Format, multiprocessors: int) -> Iterator[Op]:
    m, c, n, e = block.rows, block.end, block.images, fmt.element
    yield coefficients("forward", c, 1)
    yield coefficients("backward", c, 1)
    # What it leaves to the correction: two multiply-adds and a product, in PyTorch.
    yield vectors("deferred sums", "backward", c, 8, 3, 3)
    if block.transition is None:
        sums = partials(n, c)
        yield Op("final pool forward", "forward", m * c * e, n * c * e)
        read = (n + m) * c * e + sums
        yield Op("final pool backward", "backward", read, m * c * e + sums, launches=2)
        return
    out, pooled = block.transition, block.pooled_rows
    weights = out * c
    yield product(
        "transition forward",
        "forward",
        operand=4 * pooled * c * e,
        sweeps=ceil_div(out, NARROW_COLUMNS),
        others=weights * fmt.parameter,
        result=pooled * out * e,
        weight=packed(out, c, 1, fmt),
        flops=2 * pooled * weights,
        launches=2,
    )
    yield product(
        "transition backward",
        "backward",
        operand=pooled * out * e,
        sweeps=ceil_div(c, NARROW_COLUMNS),
        others=4 * pooled * c * e + weights * fmt.parameter,
        result=m * c * e,
        weight=packed(c, out, 1, fmt),
        partial=partials(ceil_div(pooled, TILE_ROWS), c),
        flops=2 * pooled * weights,
        launches=4 if block.size % 2 else 3,
    )
    splits = row_splits(pooled, out, c, fmt, multiprocessors)
    yield product(
        "transition backward",
        "backward",
        operand=pooled * (out + 4 * c) * e,
        result=weights * fmt.parameter,
        partial=splits * weights * STATISTIC,
        flops=2 * pooled * weights,
        launches=2,
    )


def _around(block: Block, fmt: Format) -> Iterator[Op]:
    """What a block does once: its input into the buffer and out of it, and the norms' counters."""
    size = block.rows * block.channels
    yield Op("copy of the input", "forward", size * fmt.element, size * fmt.element)
    yield channel_statistics(block.rows, block.channels, fmt)
    channels = sum(block.start(layer) + block.bottleneck for layer in range(block.layers))
    yield running_statistics(2 * block.layers + 1, channels + block.end)
    yield vectors("deferred sums", "backward", block.end, 0, 2, 1)  # zeros
    yield finish_gradient("input gradient", size, fmt)


def _stem(spec: NetworkSpec, fmt: Format, mode: str) -> Iterator[Op]:
    s, e = stem(spec), fmt.element
    yield from conv0_forward(spec, fmt)
    yield from conv0_backward(spec, fmt)
    if not s.pooled_rows:
        return
    if mode != "none":
        yield from conv0_forward(spec, fmt, again=True)
    features, pooled = s.rows * s.channels, s.pooled_rows * s.channels
    yield channel_statistics(s.rows, s.channels, fmt)
    yield running_statistics(1, s.channels)
    yield coefficients("forward", s.channels, 1)
    yield coefficients("backward", s.channels, 1)
    yield Op("stem", "forward", features * e, pooled * (e + 1))  # one byte for a position
    sums = partials(ceil_div(s.rows, REDUCED_ROWS), s.channels)
    read = pooled * (e + 1) + features * e + sums
    yield Op("stem", "backward", read, features * e + sums, launches=2)
    yield Op("stem", "backward", 2 * features * e, features * e)  # the rest of the norm's backward


def fused_step(spec: NetworkSpec, fmt: Format, mode: Checkpoint, multiprocessors: int) -> list[Op]:
    """A training step of ours in checkpoint mode "none", "bottleneck" or "block"."""
    ops = [*_stem(spec, fmt, mode), *head(spec, fmt)]
    planned = plans(fused_network(spec, fmt), mode)
    for block, (_, hold) in zip(blocks(spec), planned, strict=True):
        ops += _around(block, fmt)
        if mode == "block":
            size = block.rows * block.channels * fmt.element
            ops.append(Op("copy of the input", "backward", size, size))
            ops.append(at_once("backward", 2 * block.layers, 2 * block.layers))
        ops.append(at_once("forward", 1, 2 * block.layers))
        ops.append(at_once("backward", 2 * block.layers, 3 * block.layers - hold))
        for layer in range(block.layers):
            ops += layer_forward(block, layer, fmt)
            if mode == "block":
                ops += layer_again(block, layer, fmt)
            recompute = layer < block.layers - hold
            ops += layer_backward(block, layer, fmt, multiprocessors, recompute=recompute)
        ops += _tail(block, fmt, multiprocessors)
    return ops
