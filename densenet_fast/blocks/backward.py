"""The backward of a dense block, from the last layer to the first, over one gradient buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.forward import Block, Statistics, matrix, recompute_features
from densenet_fast.blocks.memory_plan import gradient_in_place
from densenet_fast.operators.rows import (
    as_rows,
    empty_channels_last,
    empty_gradient,
    empty_rows,
    images_of,
    pitched,
    row_pitch,
    rows_of,
)

Gradients = list[Tensor | None]


def gradients(
    block: Block,
    anchor: Tensor,
    vector: Tensor,
    bottlenecks: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> Gradients:
    """The gradients of the input and of every parameter, from what the forward has kept.

    `anchor` is the block's input where checkpoint="block", else the feature buffer. `needs` says
    which of these gradients are wanted.
    """
    statistics = Statistics(block.geometry, vector)
    if block.settings.checkpoint == "block":
        features, bottlenecks = recompute_features(anchor, block, statistics)
    else:
        features = as_rows(anchor)
        bottlenecks = [pitched(bottleneck) for bottleneck in bottlenecks]
    return BlockBackward(block, features, statistics, bottlenecks, needs).run(grad_output)


class BlockBackward:
    """One backward: the gradient buffer, the deferred sums, and scratch shared by all layers."""

    def __init__(
        self,
        block: Block,
        features: Tensor,
        statistics: Statistics,
        bottlenecks: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> None:
        """Prepare for the gradients that `needs` says."""
        self.block = block
        self.geometry = geometry = block.geometry
        self.features = features
        self.statistics = statistics
        self.bottlenecks = bottlenecks  # of the last layers
        self.input_needed, *self.needs = needs
        layers = geometry.layers
        self.bias_needs = self.needs[6 * layers : 7 * layers]
        of_layers = [
            any(self.needs[6 * at : 6 * at + 6]) or self.bias_needs[at] for at in range(layers)
        ]
        wanting = [at for at, need in enumerate(of_layers) if need]
        # Below this layer nothing needs a gradient.
        self.lowest = -1 if self.input_needed else min(wanting, default=geometry.layers)
        self.grad_features = self._gradient_buffer()
        # Sums over the norms done so far, of scale * grad_beta and of scale * rstd * grad_gamma;
        # behind them those of the norm2 at work, where ranks exchange them.
        channels = geometry.channels
        self.exchanging = any(geometry.bottleneck_groups)
        behind = 2 * max(geometry.widths) if self.exchanging else 0
        self.sums = statistics.vector.new_zeros(2 * channels + behind)
        self.sum_grad, self.sum_grad_x = self.sums[: 2 * channels].view(2, -1).unbind()

    def _gradient_buffer(self) -> Tensor:
        channels = self.geometry.channels
        pitch = row_pitch(channels, self.features.itemsize, cuda=self.features.is_cuda)
        return rows_of(self._images(channels, pitch))

    def _images(self, channels: int, pitch: int | None = None) -> Tensor:
        images, *size = self.geometry.pixels
        return empty_channels_last((images, channels, *size), self.features, pitch)

    def run(self, grad_output: Tensor) -> Gradients:
        """The input's gradient and the parameters', the tail's last.

        Where none is wanted there may be None, room without elements, or one made in passing.
        """
        tail_gradients: Gradients = []
        if self.block.settings.tail == "none":
            self.grad_features.copy_(rows_of(grad_output))
        else:
            tail_gradients = self._tail(grad_output)
        gradients = self._layers()
        return [self._input() if self.input_needed else None, *gradients, *tail_gradients]

    def _vectors(self, channels: int) -> tuple[Tensor, Tensor]:
        """Room for grad_gamma and grad_beta: each its own storage, as parameters may keep them."""
        mean = self.statistics.mean
        return mean.new_empty(channels), mean.new_empty(channels)

    def _exchange_features(self, segment: int) -> None:
        """Complete the deferred sums of a segment, all of whose readers are done, over the ranks.

        They will be divided by the rows of this process.
        """
        geometry = self.geometry
        if geometry.group and segment < geometry.reduced:
            start, end = geometry.segment(segment)
            mine = self.sums[: 2 * geometry.channels].view(2, -1)[:, start:end]
            sums = mine.clone(memory_format=torch.contiguous_format)
            total = self.statistics.features_total()
            sums = synchronized.mean_over_ranks(geometry.group, sums, total)
            mine.copy_(sums.mul_(geometry.rows))

    def _exchange_norm2(self, layer: int, gradients: Sequence[Tensor]) -> None:
        """Hand a norm2's sums to its half-layer, over the ranks where it is synchronised."""
        gamma, beta = gradients[6 * layer + 3 : 6 * layer + 5]
        if not self.exchanging or not gamma.numel():
            return
        sums, group = torch.stack((gamma, beta)), self.geometry.bottleneck_groups[layer]
        if group:
            total = self.statistics.bottleneck_total(layer)
            sums = synchronized.mean_over_ranks(group, sums, total).mul_(self.geometry.rows)
        start = 2 * self.geometry.channels
        self.sums[start : start + sums.numel()].copy_(sums.view(-1))

    def _tail(self, grad_output: Tensor) -> Gradients:
        block = self.block
        forward = block.tail_coefficients(self.statistics)
        grad_gamma, grad_beta = self._vectors(self.geometry.channels)
        found: Gradients = [grad_gamma, grad_beta]
        if block.settings.tail == "transition":
            of_conv = block.parameters[-1]
            weight = matrix(of_conv)
            grad_weight = _like(weight) if self.needs[-1] else None
            operators.transition_backward(
                as_rows(grad_output),
                self.features,
                *forward,
                weight,
                self.grad_features,
                grad_gamma,
                grad_beta,
                grad_weight,
                block.settings.linear,
            )
            if grad_weight is not None and of_conv is not None:
                grad_weight = grad_weight.view(of_conv.shape)
            found.append(grad_weight)
        else:
            operators.norm_relu_avgpool_backward(
                grad_output.contiguous(),
                self.features,
                *forward,
                self.grad_features,
                grad_gamma,
                grad_beta,
            )
        if block.settings.batch_statistics[-1]:
            self.sum_grad.addcmul_(forward.scale, grad_beta)
            self.sum_grad_x.addcmul_(forward.scale * forward.rstd, grad_gamma)
        return found

    def _layers(self) -> Gradients:
        geometry, layers, first = self.geometry, self.geometry.layers, 2 * max(self.lowest, 0)
        if first == 2 * layers:
            return [None] * (7 * layers)
        gradients: Any = [tensor for layer in range(layers) for tensor in self._room(layer)]
        like, vector = self.features, self.statistics.vector
        grad_growth = empty_rows((*geometry.pixels, max(geometry.growths)), like)
        grad_norm = empty_rows((*geometry.pixels, max(geometry.widths)), like)
        parameters, frozen, *numbers = self.block.arguments(vector)
        arguments: Any = (
            self.features,
            self.grad_features,
            vector,
            self.sums,
            self.block.rooms(like, self.bottlenecks),
            grad_growth.view(-1),
            grad_norm.view(-1),
            self.block.scratch(vector),
            parameters,
            frozen,
            gradients,
            *numbers,
            len(self.bottlenecks),
            self.lowest,
        )
        run: Any = operators.dense_block_backward_
        exchanges = geometry.synchronised
        at_once = 1 if exchanges else 2 if self.block.biased else 2 * layers - first
        of_biases: Gradients = [None] * layers
        for half in reversed(range(first, 2 * layers, at_once)):
            last = half + at_once
            layer = (last - 1) // 2
            if last % 2 == 0:
                if exchanges:
                    self._exchange_features(layer + 1)
                of_biases[layer] = self._bias(layer)
            if any(tensor.numel() for tensor in gradients[6 * layer : 6 * layer + 6]):
                run(*arguments, half, last)
            if exchanges and half % 2 == 1:
                self._exchange_norm2(layer, gradients)
        return [*gradients, *of_biases]

    def _bias(self, layer: int) -> Tensor | None:
        """The gradient of a layer's bias: sums of its output's, which this completes for it."""
        geometry, statistics = self.geometry, self.statistics
        if self.block.biases[layer] is None:
            return None
        start, end = geometry.segment(layer + 1)
        gradient = self.grad_features[..., start:end]
        if layer + 1 < geometry.reduced:
            sums = self.sum_grad[start:end], self.sum_grad_x[start:end]
            features, mean = self.features[..., start:end], statistics.mean[start:end]
            operators.finish_gradient(features, gradient, mean, *sums, gradient)
            for deferred in sums:  # nothing is left for the operators to correct
                deferred.zero_()
        self.block.drop_(layer, gradient)
        if not self.bias_needs[layer]:
            return None
        return gradient.sum(tuple(range(gradient.dim() - 1)), dtype=statistics.mean.dtype)

    def _room(self, layer: int) -> Sequence[Tensor]:
        """Room for a layer's gradients, in the order of its parameters; some without elements."""
        needs, weights = self.needs[6 * layer : 6 * layer + 6], self.block.parameters
        none = self.sums[:0]
        if layer < self.lowest:
            return (none,) * 6
        features_needed = self.lowest < layer
        conv1_needed = features_needed or any(needs[:3])
        norm1_needed = features_needed or needs[0] or needs[1]
        norm2_needed = conv1_needed or needs[3] or needs[4]
        start, width = self.geometry.starts[layer], self.geometry.widths[layer]
        if not width:
            return (
                *(none, none, none),
                *(self._vectors(start) if features_needed or any(needs[3:5]) else (none, none)),
                _like(weights[6 * layer + 5]) if needs[5] else none,
            )
        return (
            *(self._vectors(start) if norm1_needed else (none, none)),
            _like(weights[6 * layer + 2]) if needs[2] else none,
            *(self._vectors(width) if norm2_needed else (none, none)),
            _like(weights[6 * layer + 5]) if needs[5] else none,
        )

    def _input(self) -> Tensor:
        channels = self.geometry.starts[0]
        given = self.grad_features[..., :channels]
        in_place = gradient_in_place(channels, self.geometry.channels)
        rows = given if in_place else rows_of(self._images(channels))
        if self.geometry.reduced:
            self._exchange_features(0)
            operators.finish_gradient(
                self.features[..., :channels],
                given,
                self.statistics.mean[:channels],
                self.sum_grad[:channels],
                self.sum_grad_x[:channels],
                rows,
            )
        elif not in_place:
            rows.copy_(given)
        return images_of(rows)


def gradient_pitch(channels: int, end: int, like: Tensor) -> int:
    """Elements between the rows of the gradient of a block's input of so many channels."""
    if not gradient_in_place(channels, end):
        return channels
    return row_pitch(end, like.itemsize, cuda=like.is_cuda)


def _like(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return empty_gradient(weight)
