"""The usual network, operation by operation, as PyTorch runs torchvision's modules.

In its favour: every operand of an operation is read once and every result written once, whatever a
library does inside, and layouts never need a conversion.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.networks import NetworkSpec
from benchmarks.prediction.common import conv0_backward, conv0_forward, head
from benchmarks.prediction.shapes import Block, Format, Op, Phase, blocks, stem

POOL_INDEX = 8  # bytes: PyTorch's max-pooling keeps int64 positions


def cat(name: str, elements: int, fmt: Format, phase: Phase = "forward") -> Op:
    """Concatenation: a copy of all that was concatenated before."""
    return Op(name, phase, elements * fmt.element, elements * fmt.element)


def norm_relu(name: str, elements: int, fmt: Format, phase: Phase = "forward") -> list[Op]:
    """Batch norm (statistics, normalisation, the step counter), then ReLU in place."""
    size = elements * fmt.element
    return [
        Op(name, phase, size, 0),
        Op(name, phase, size, size),
        Op(name, phase, 0, 0),  # num_batches_tracked
        Op(name, phase, size, size),
    ]


def norm_relu_backward(name: str, elements: int, fmt: Format) -> list[Op]:
    """ReLU by its result; batch norm's two sums, then its input's gradient."""
    size = elements * fmt.element
    return [
        Op(name, "backward", 2 * size, size),
        Op(name, "backward", 2 * size, 0),
        Op(name, "backward", 2 * size, size),
    ]


def conv_forward(name: str, rows: int, weights: int, reads: int, writes: int, fmt: Format) -> Op:
    """A convolution of `rows` pixels, `reads` to `writes` channels; its weight rounded before."""
    e = fmt.element
    read, written = (rows * reads + weights) * e, rows * writes * e
    if fmt.casts:
        read, written = read + weights * fmt.parameter, written + weights * e
    return Op(name, "forward", read, written, 2 * rows * weights, launches=1 + fmt.casts)


def conv_backward(
    name: str, rows: int, weights: int, reads: int, writes: int, fmt: Format
) -> list[Op]:
    """Its data gradient and its weight gradient."""
    e, flops = fmt.element, 2 * rows * weights
    ops = [
        Op(f"{name} dgrad", "backward", (rows * writes + weights) * e, rows * reads * e, flops),
        Op(f"{name} wgrad", "backward", rows * (writes + reads) * e, weights * e, flops),
    ]
    if fmt.casts:
        ops.append(Op(f"{name} wgrad", "backward", weights * e, weights * fmt.parameter))
    return ops


def layer_forward(block: Block, layer: int, fmt: Format) -> Iterator[Op]:
    """cat, norm1, ReLU, conv1, norm2, ReLU, conv2."""
    m, c, b, k = block.rows, block.start(layer), block.bottleneck, block.growth
    yield cat("concatenation", m * c, fmt)
    yield from norm_relu("norm1, ReLU", m * c, fmt)
    yield conv_forward("conv1x1", m, b * c, c, b, fmt)
    yield from norm_relu("norm2, ReLU", m * b, fmt)
    yield conv_forward("conv3x3", m, block.taps * b * k, b, k, fmt)


def layer_backward(block: Block, layer: int, fmt: Format, *, efficient: bool) -> Iterator[Op]:
    """The same backwards; `efficient` makes concatenation, norm1 and ReLU again before."""
    m, c, b, k = block.rows, block.start(layer), block.bottleneck, block.growth
    yield from conv_backward("conv3x3", m, block.taps * b * k, b, k, fmt)
    yield from norm_relu_backward("norm2, ReLU", m * b, fmt)
    if efficient:
        yield cat("recomputation", m * c, fmt, "backward")
        yield from norm_relu("recomputation", m * c, fmt, "backward")
    yield from conv_backward("conv1x1", m, b * c, c, b, fmt)
    yield from norm_relu_backward("norm1, ReLU", m * c, fmt)
    # Concatenation's backward is views; each piece is added to what later readers have sent.
    size = m * c * fmt.element
    yield Op("gradient accumulation", "backward", 2 * size, size, launches=layer + 1)


def _tail(block: Block, fmt: Format) -> Iterator[Op]:
    m, c, e = block.rows, block.end, fmt.element
    yield from norm_relu("tail", m * c, fmt)
    if block.transition is None:
        yield Op("tail", "forward", m * c * e, block.images * c * e)
        return
    out = block.transition
    yield conv_forward("tail", m, c * out, c, out, fmt)
    yield Op("tail", "forward", m * out * e, block.pooled_rows * out * e)


def _tail_backward(block: Block, fmt: Format) -> Iterator[Op]:
    m, c, e = block.rows, block.end, fmt.element
    if block.transition is None:
        yield Op("tail", "backward", block.images * c * e, m * c * e)
    else:
        out = block.transition
        yield Op("tail", "backward", block.pooled_rows * out * e, m * out * e)
        yield from (
            Op("tail", op.phase, op.read, op.written, op.flops)
            for op in conv_backward("tail", m, c * out, c, out, fmt)
        )
    yield from norm_relu_backward("tail", m * c, fmt)


def usual_step(spec: NetworkSpec, fmt: Format, *, efficient: bool = False) -> list[Op]:
    """A training step of the usual network; `efficient` is torchvision's memory_efficient."""
    s, e = stem(spec), fmt.element
    ops = [*conv0_forward(spec, fmt), *conv0_backward(spec, fmt), *head(spec, fmt)]
    if s.pooled_rows:
        features, pooled = s.rows * s.channels, s.pooled_rows * s.channels
        moved = pooled * (e + POOL_INDEX)
        ops += norm_relu("stem", features, fmt)
        ops += [
            Op("stem", "forward", features * e, moved),
            Op("stem", "backward", moved, features * e),
        ]
        ops += norm_relu_backward("stem", features, fmt)
    for block in blocks(spec):
        for layer in range(block.layers):
            ops += layer_forward(block, layer, fmt)
            ops += layer_backward(block, layer, fmt, efficient=efficient)
        ops.append(cat("concatenation", block.rows * block.end, fmt))
        ops += [*_tail(block, fmt), *_tail_backward(block, fmt)]
    return ops
