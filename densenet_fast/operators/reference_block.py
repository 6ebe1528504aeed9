"""A dense block in plain PyTorch: the definition of the operators that run one in a single call.

The loops below stand once more in `csrc/block.h`, for the compiled kernels; `operators` are the
products and pooling of a half-layer. Per layer the lists hold

- `parameters`: norm1's weight and bias, conv1's weight, norm2's weight and bias, conv2's weight;
- `frozen`: running mean and variance of norm1 and of norm2 (nothing at all if no norm is frozen);
- `gradients`: in the parameters' order, statistics' type for norms;
- `numbers`: eps of norm1 and of norm2, probability of dropout, 1 if that drops whole channels of
  an image and 0 if elements; `seeds`: one number.

A tensor without elements stands for one that is not there; in a layer without conv1's weight norm2
and conv2 read the features, and half-layer 2 l is nothing. `statistics` are the means of the
features [C], their variances [C], then mean and variance of every bottleneck. Segment 0 of the
features is the block's input, segment l + 1 the growth of layer l: the first `reduced` segments are
normalised with statistics of the batch. Half-layer 2 l is norm1 and conv1 of layer l, half-layer
2 l + 1 norm2 and conv2; a call runs those in [first, last), and between two calls ranks may
exchange what they have found.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.operators import reference


class Coefficients(NamedTuple):
    """A norm as the operators read it: scale * x + shift; mean and rstd are for its backward."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


class _Block:
    """The arguments that both directions share, by layer."""

    def __init__(
        self,
        features: Tensor,
        statistics: Tensor,
        bottlenecks: Sequence[Tensor],
        parameters: Sequence[Tensor],
        frozen: Sequence[Tensor],
        numbers: Sequence[float],
        seeds: Sequence[int],
        reduced: int,
        operators: Any,
    ) -> None:
        self.features, self.bottlenecks, self.operators = features, bottlenecks, operators
        self.parameters, self.frozen, self.reduced = parameters, frozen, reduced
        self.numbers, self.seeds = numbers, seeds
        count, channels = len(seeds), features.shape[-1]
        widths = [len(parameters[6 * layer + 2]) for layer in range(count)]
        growths = [len(parameters[6 * layer + 5]) for layer in range(count)]
        self.starts = [channels - sum(growths)]
        for growth in growths:
            self.starts.append(self.starts[-1] + growth)
        sizes = [channels, channels, *(width for width in widths for _ in "mv")]
        self.mean, self.var, *self.of_bottlenecks = statistics[: sum(sizes)].split(sizes)

    def weight(self, layer: int, convolution: int) -> Tensor:
        """The weight of conv1 or conv2, a 1x1 convolution's as a matrix."""
        weight = self.parameters[6 * layer + 3 * convolution - 1]
        return weight.flatten(1) if convolution == 1 else weight

    def has_bottleneck(self, layer: int) -> bool:
        return self.parameters[6 * layer + 2].numel() > 0

    def input(self, layer: int) -> Tensor:
        """What conv2 reads."""
        if self.has_bottleneck(layer):
            return self.bottlenecks[layer]
        return self.features[..., : self.starts[layer]]

    def drop_(self, layer: int, tensor: Tensor) -> None:
        """Dropout, if the layer has any."""
        p, channels = self.numbers[4 * layer + 2 : 4 * layer + 4]
        if p:
            self.operators.dropout_(tensor, self.seeds[layer], p, bool(channels))

    def is_frozen(self, layer: int, norm: int) -> bool:
        return bool(self.frozen) and self.frozen[4 * layer + 2 * norm - 2].numel() > 0

    def norm(self, layer: int, norm: int) -> Coefficients:
        start = self.starts[layer]
        mean, var = self.mean[:start], self.var[:start]
        if norm == 2 and self.has_bottleneck(layer):
            mean, var = self.of_bottlenecks[2 * layer : 2 * layer + 2]
        if self.is_frozen(layer, norm):
            mean, var = self.frozen[4 * layer + 2 * norm - 2 : 4 * layer + 2 * norm]
        at = 6 * layer + 3 * norm - 3
        weight, bias = (t if t.numel() else None for t in self.parameters[at : at + 2])
        scale, shift, rstd = mean.new_empty(3, len(mean)).unbind()
        eps = self.numbers[4 * layer + norm - 1]
        self.operators.norm_coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
        return Coefficients(scale, shift, mean, rstd)

    def narrow(self, layer: int, *, reduce: bool) -> None:
        """Norm1 and conv1: the bottleneck of a layer."""
        scale, shift, _, _ = self.norm(layer, 1)
        wanted: Sequence[Tensor | None] = (None, None)
        if reduce and not self.is_frozen(layer, 2):
            wanted = self.of_bottlenecks[2 * layer : 2 * layer + 2]
        prefix, bottleneck = self.features[..., : self.starts[layer]], self.bottlenecks[layer]
        self.operators.conv1x1_forward(
            prefix, scale, shift, self.weight(layer, 1), bottleneck, *wanted
        )


def dense_block_forward_(
    features: Tensor,
    statistics: Tensor,
    bottlenecks: Sequence[Tensor],
    vectors: Tensor,
    parameters: Sequence[Tensor],
    frozen: Sequence[Tensor],
    numbers: Sequence[float],
    seeds: Sequence[int],
    reduced: int,
    recompute: bool,
    first: int,
    last: int,
    *,
    operators: Any = reference,
) -> None:
    """Every layer's channels of `features` [N, *size, C], from those before them.

    `recompute` takes all statistics as they are. `vectors` are the compiled kernels' scratch.
    """
    block = _Block(
        features, statistics, bottlenecks, parameters, frozen, numbers, seeds, reduced, operators
    )
    for half in range(first, last):
        layer = half // 2
        if half % 2 == 0:
            if block.has_bottleneck(layer):
                block.narrow(layer, reduce=not recompute)
            continue
        scale, shift, _, _ = block.norm(layer, 2)
        start, end = block.starts[layer : layer + 2]
        growth = features[..., start:end]
        wanted: Sequence[Tensor | None] = (None, None)
        if not recompute and layer + 1 < reduced:
            wanted = (block.mean[start:end], block.var[start:end])
        dropout, weight = numbers[4 * layer + 2], block.weight(layer, 2)
        behind = (None, None) if dropout else wanted
        operators.conv3x3_forward(block.input(layer), scale, shift, weight, growth, *behind)
        block.drop_(layer, growth)
        if dropout and wanted[0] is not None:
            operators.channel_statistics(growth, *wanted)


def dense_block_backward_(
    features: Tensor,
    grad_features: Tensor,
    statistics: Tensor,
    sums: Tensor,
    bottlenecks: Sequence[Tensor],
    grad_growth: Tensor,
    grad_norm: Tensor,
    vectors: Tensor,
    parameters: Sequence[Tensor],
    frozen: Sequence[Tensor],
    gradients: Sequence[Tensor],
    numbers: Sequence[float],
    seeds: Sequence[int],
    reduced: int,
    held: int,
    lowest: int,
    first: int,
    last: int,
    *,
    operators: Any = reference,
) -> None:
    """Every layer's gradients, from the last half-layer down; `grad_features` accumulates.

    `sums` are those over the norms done so far, of scale * grad_beta [C] and of
    scale * rstd * grad_gamma [C]: divided by the number of values they correct a channel's gradient
    for all its readers at once. Where ranks exchange the sums of norm2, these stand behind them.
    The last `held` bottlenecks are there, the others are made again. Below layer `lowest` nothing
    needs a gradient; -1: the block's input does. `grad_growth` and `grad_norm` are scratch.
    """
    block = _Block(
        features, statistics, bottlenecks, parameters, frozen, numbers, seeds, reduced, operators
    )
    channels, rows = features.shape[-1], features[..., 0].numel()
    sum_grad, sum_grad_x, exchanged = sums.split((channels, channels, len(sums) - 2 * channels))

    def image(scratch: Tensor, width: int) -> Tensor:
        return scratch[: rows * width].view(*features.shape[:-1], width)

    def given(gradient: Tensor) -> Tensor | None:
        return gradient if gradient.numel() else None

    def defer(start: int, norm: Coefficients, gamma: Tensor | None, beta: Tensor | None) -> None:
        assert gamma is not None
        assert beta is not None
        sum_grad[:start] += norm.scale * beta
        sum_grad_x[:start] += norm.scale * norm.rstd * gamma

    for half in reversed(range(max(first, 2 * lowest), last)):
        layer = half // 2
        gamma1, beta1, grad_conv1, gamma2, beta2, grad_conv2 = map(
            given, gradients[6 * layer : 6 * layer + 6]
        )
        features_needed = lowest < layer
        conv1_needed = features_needed or gamma1 is not None or grad_conv1 is not None
        start, end = block.starts[layer : layer + 2]
        wide = not block.has_bottleneck(layer)
        if wide and half % 2 == 0:
            continue
        bottleneck = block.input(layer)
        grad_prefix = grad_features[..., :start] if features_needed else None
        norm2 = block.norm(layer, 2)
        grad_norm2 = image(grad_norm, 0 if wide else bottleneck.shape[-1])
        if half % 2 == 1:
            if not wide and layer < len(seeds) - held:
                block.narrow(layer, reduce=False)
            gradient = grad_features[..., start:end]
            if layer + 1 < reduced:
                out = image(grad_growth, end - start)
                operators.finish_gradient(
                    features[..., start:end],
                    gradient,
                    block.mean[start:end],
                    sum_grad[start:end],
                    sum_grad_x[start:end],
                    out,
                )
                gradient = out
            block.drop_(layer, gradient)
            operators.conv3x3_backward(
                gradient,
                bottleneck,
                *norm2,
                block.weight(layer, 2),
                grad_prefix if wide else grad_norm2 if conv1_needed else None,
                gamma2,
                beta2,
                grad_conv2,
                wide,
            )
            if wide and features_needed and not block.is_frozen(layer, 2):
                defer(start, norm2, gamma2, beta2)
            continue
        if not conv1_needed:
            continue
        norm1, width = block.norm(layer, 1), len(norm2.mean)
        if len(exchanged):
            gamma2, beta2 = exchanged[: 2 * width].split(width)
        operators.conv1x1_backward(
            grad_norm2,
            bottleneck,
            _affine_gradient(norm2, gamma2, beta2, rows, frozen=block.is_frozen(layer, 2)),
            features[..., :start],
            *norm1,
            block.weight(layer, 1),
            grad_prefix,
            gamma1,
            beta1,
            None if grad_conv1 is None else grad_conv1.flatten(1),
        )
        if features_needed and not block.is_frozen(layer, 1):
            defer(start, norm1, gamma1, beta1)


def _affine_gradient(
    norm: Coefficients,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    rows: int,
    *,
    frozen: bool,
) -> Tensor:
    """A norm's backward as one affine map, rows p, q, s: grad_x = p * grad_norm + q * x + s."""
    coefficients = torch.zeros(3, len(norm.scale), dtype=norm.scale.dtype, device=norm.scale.device)
    p, q, s = coefficients.unbind()
    p.copy_(norm.scale)
    if not frozen and grad_gamma is not None and grad_beta is not None:
        q.copy_(-norm.scale * norm.rstd * grad_gamma * (1 / rows))
        s.copy_(-norm.scale * grad_beta * (1 / rows) - q * norm.mean)
    return coefficients


def update_running_statistics_(
    statistics: Tensor,
    running: Sequence[Tensor],
    counters: Sequence[Tensor],
    places: Sequence[int],
    momenta: Sequence[float],
    count: int,
) -> None:
    """running = (1 - momentum) * running + momentum * new, with the unbiased variance of a step.

    `running` are mean and variance of each norm; four `places` for each: where its mean, its
    variance and the number of values on all ranks (-1: `count`) are in `statistics`, and its
    channels. And every counter is one more. A norm that was used twice is there twice. Everything
    is changed, or nothing: nothing can fail or interrupt Python while new values replace old ones.
    """
    fresh: dict[int, Tensor] = {}
    for index, momentum in enumerate(momenta):
        mean, var, total, channels = places[4 * index : 4 * index + 4]
        values = count if total < 0 else statistics[total]
        unbiased = statistics[var : var + channels] * (values / (values - 1))
        for buffer, new in zip(
            running[2 * index : 2 * index + 2],
            (statistics[mean : mean + channels], unbiased),
            strict=True,
        ):
            now = fresh.get(id(buffer), buffer).to(new.dtype)
            fresh[id(buffer)] = ((1 - momentum) * now + momentum * new).to(buffer.dtype)
    times = Counter(map(id, counters))
    replaced = {id(tensor): tensor for tensor in (*running, *counters)}
    for key, total in times.items():
        fresh[key] = replaced[key] + total
    # As PyTorch's norms: one that was called before, and keeps its buffers for its backward, does
    # not take them for altered.
    into = [tensor.data for tensor in replaced.values()]
    deque(map(Tensor.copy_, into, [fresh[key] for key in replaced]), maxlen=0)
