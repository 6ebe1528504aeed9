"""Operations that both implementations leave to PyTorch: first convolution, classifier, loss."""

from __future__ import annotations

from benchmarks.networks import NetworkSpec
from benchmarks.prediction.shapes import LABEL, Format, Op, Phase, blocks, stem

STATISTIC = 4  # bytes of a statistic, a sum or a partial result


def conv0_forward(spec: NetworkSpec, fmt: Format, *, again: bool = False) -> list[Op]:
    """The first convolution; `again`: made once more in the backward."""
    s, e = stem(spec), fmt.element
    phase: Phase = "backward" if again else "forward"
    name = "stem recomputed" if again else "stem"
    ops = [Op(name, phase, s.image_elements * e + s.weights * e, s.rows * s.channels * e, s.flops)]
    if fmt.casts:
        cast = s.image_elements + s.weights
        ops.append(Op(name, phase, cast * fmt.parameter, cast * e, launches=2))
    return ops


def conv0_backward(spec: NetworkSpec, fmt: Format) -> list[Op]:
    """Its weight gradient: images want none."""
    s, e = stem(spec), fmt.element
    ops = [
        Op("stem", "backward", (s.image_elements + s.rows * s.channels) * e, s.weights * e, s.flops)
    ]
    if fmt.casts:
        ops.append(Op("stem", "backward", s.weights * e, s.weights * fmt.parameter))
    return ops


def head(spec: NetworkSpec, fmt: Format) -> list[Op]:
    """Classifier and cross entropy, forward and backward."""
    n, c, classes, e = spec.batch_size, blocks(spec)[-1].end, spec.num_classes, fmt.element
    weights, logits, flops = c * classes, n * classes, 2 * n * c * classes
    wide = fmt.parameter  # log-softmax works in float32
    ops = [
        Op("classifier", "forward", (n * c + weights + classes) * e, logits * e, flops),
        Op("loss", "forward", 2 * logits * wide, logits * wide, launches=2),
        Op("loss", "backward", 2 * logits * wide + n * LABEL, 2 * logits * wide, launches=2),
        Op("classifier", "backward", (logits + weights) * e, n * c * e, flops),
        Op("classifier", "backward", (logits + n * c) * e, weights * e, flops),
        Op("classifier", "backward", logits * e, classes * e),  # the bias
    ]
    if fmt.casts:
        cast = weights + classes
        ops += [
            Op("classifier", "forward", cast * wide, cast * e, launches=2),
            Op("loss", "forward", logits * e, logits * wide),
            Op("loss", "backward", logits * wide, logits * e),
            Op("classifier", "backward", cast * e, cast * wide, launches=2),
        ]
    return ops


def ceil_div(size: int, part: int) -> int:
    """Parts of `part` that cover `size`."""
    return -(-size // part)
