"""The backward of a dense block, from the last layer to the first, over one gradient buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_fast import ops, synchronized
from densenet_fast.block_forward import (
    Geometry,
    Statistics,
    block_arguments,
    bottleneck_rooms,
    coefficient_scratch,
    matrix,
    recompute_features,
    tail_coefficients,
)
from densenet_fast.layout import as_rows, empty_channels_last, empty_rows, row_pitch
from densenet_fast.norms import parameter_gradient
from densenet_fast.specs import (
    Checkpoint,
    LayerSpec,
    NormSpec,
    Tail,
    TransitionTail,
    layer_parameters,
)

Gradients = list[Tensor | None]
# Which of (norm1.weight, norm1.bias, conv1, norm2.weight, norm2.bias, conv2) want a gradient.
LayerNeeds = Sequence[bool]


def gradients(
    geometry: Geometry,
    layers: Sequence[LayerSpec],
    tail: Tail | None,
    anchor: Tensor,
    statistics: Statistics,
    bottlenecks: Sequence[Tensor],
    seeds: Sequence[int],
    checkpoint: Checkpoint,
    hold: int,
    needs: Sequence[bool],
    grad_output: Tensor,
) -> Gradients:
    """The gradients of the input and of every parameter, from what the forward has kept.

    `anchor` is the block's input where checkpoint="block", else the feature buffer. `needs` says
    which of these gradients are wanted.
    """
    if checkpoint == "block":
        features, bottlenecks = recompute_features(
            anchor, layers, tail, geometry, statistics, seeds, hold
        )
    else:
        features = as_rows(anchor)
    ends = 1 + 6 * len(layers)
    backward = BlockBackward(
        geometry,
        layers,
        features,
        statistics,
        [as_rows(bottleneck.permute(0, 3, 1, 2)) for bottleneck in bottlenecks],
        seeds,
        input_needed=needs[0],
        needs=[needs[start : start + 6] for start in range(1, ends, 6)],
    )
    grad_input, others = backward.run(tail, needs[ends:], grad_output)
    return [grad_input, *others]


class BlockBackward:
    """One backward: the gradient buffer, the deferred sums, and scratch shared by all layers."""

    def __init__(
        self,
        geometry: Geometry,
        layers: Sequence[LayerSpec],
        features: Tensor,
        statistics: Statistics,
        bottlenecks: Sequence[Tensor],
        seeds: Sequence[int],
        *,
        input_needed: bool,
        needs: Sequence[LayerNeeds],
    ) -> None:
        """Prepare for `layers`, whose parameters want gradients as `needs` says."""
        self.geometry = geometry
        self.layers = layers
        self.features = features
        self.statistics = statistics
        self.bottlenecks = bottlenecks  # of the last layers
        self.seeds = seeds
        self.input_needed = input_needed
        self.needs = needs
        wanting = [index for index, need in enumerate(needs) if any(need)]
        # Below this layer nothing needs a gradient.
        self.lowest = -1 if input_needed else min(wanting, default=len(layers))
        self.grad_features = self._gradient_buffer()
        # Sums over the norms done so far, of scale * grad_beta and of scale * rstd * grad_gamma;
        # behind them those of the norm2 at work, where ranks exchange them.
        channels = geometry.channels
        self.exchanging = any(group is not None for group in geometry.bottleneck_groups)
        behind = 2 * max(geometry.widths) if self.exchanging else 0
        self.sums = statistics.vector.new_zeros(2 * channels + behind)
        self.sum_grad, self.sum_grad_x = self.sums[: 2 * channels].view(2, -1).unbind()

    def _gradient_buffer(self) -> Tensor:
        channels = self.geometry.channels
        pitch = row_pitch(channels, self.features.itemsize, cuda=self.features.is_cuda)
        images, height, width = self.geometry.pixels
        shape = (images, channels, height, width)
        return empty_channels_last(shape, self.features, pitch).permute(0, 2, 3, 1)

    def run(
        self, tail: Tail | None, tail_needs: Sequence[bool], grad_output: Tensor
    ) -> tuple[Tensor | None, Gradients]:
        """The input's gradient and the parameters', layer by layer and the tail's last."""
        tail_gradients: Gradients = []
        if tail is None:
            self.grad_features.copy_(grad_output.permute(0, 2, 3, 1))
        else:
            tail_gradients = self._tail(tail, tail_needs, grad_output)
        gradients = self._layers()
        return self._input() if self.input_needed else None, gradients + tail_gradients

    def _vectors(self, channels: int) -> tuple[Tensor, Tensor]:
        """Room for grad_gamma and grad_beta: each its own storage, as parameters may keep them."""
        mean = self.statistics.mean
        return mean.new_empty(channels), mean.new_empty(channels)

    def _exchange_features(self, segment: int) -> None:
        """Complete the deferred sums of a segment, all of whose readers are done, over the ranks.

        They will be divided by the rows of this process.
        """
        geometry, total = self.geometry, self.statistics.features_total()
        if geometry.group is None or total is None or segment >= geometry.reduced:
            return
        start, end = geometry.segment(segment)
        mine = self.sums[: 2 * geometry.channels].view(2, -1)[:, start:end]
        sums = mine.clone(memory_format=torch.contiguous_format)
        mine.copy_(synchronized.mean_over_ranks(geometry.group, sums, total).mul_(geometry.rows))

    def _exchange_norm2(self, layer: int, gradients: Sequence[Tensor]) -> None:
        """Hand a norm2's sums to its half-layer, over the ranks where it is synchronised."""
        gamma, beta = gradients[6 * layer + 3 : 6 * layer + 5]
        if not self.exchanging or not gamma.numel():
            return
        sums, group = torch.stack((gamma, beta)), self.geometry.bottleneck_groups[layer]
        if group is not None:
            total = self.statistics.total(layer)
            sums = synchronized.mean_over_ranks(group, sums, total).mul_(self.geometry.rows)
        start = 2 * self.geometry.channels
        self.sums[start : start + sums.numel()].copy_(sums.view(-1))

    def _tail(self, tail: Tail, needs: Sequence[bool], grad_output: Tensor) -> Gradients:
        forward = tail_coefficients(tail.norm, self.statistics)
        grad_gamma, grad_beta = self._vectors(self.geometry.channels)
        gradients: Gradients = []
        if isinstance(tail, TransitionTail):
            weight = matrix(tail.conv_weight)
            grad_weight = _like(weight) if needs[2] else None
            ops.transition_backward(
                as_rows(grad_output),
                self.features,
                *forward,
                weight,
                self.grad_features,
                grad_gamma,
                grad_beta,
                grad_weight,
            )
            gradients = [None if grad_weight is None else grad_weight[..., None, None]]
        else:
            ops.norm_relu_avgpool_backward(
                grad_output.contiguous(),
                self.features,
                *forward,
                self.grad_features,
                grad_gamma,
                grad_beta,
            )
        if tail.norm.batch_statistics:
            self.sum_grad.addcmul_(forward.scale, grad_beta)
            self.sum_grad_x.addcmul_(forward.scale * forward.rstd, grad_gamma)
        affine = _affine_gradients(tail.norm, grad_gamma, grad_beta)
        return affine + gradients

    def _layers(self) -> Gradients:
        geometry, layers, first = self.geometry, self.layers, 2 * max(self.lowest, 0)
        if first == 2 * len(layers):
            return [None] * (6 * len(layers))
        room = [self._room(index) for index in range(len(layers))]
        gradients = [tensor for layer in room for tensor in layer]
        like = self.features
        grad_growth = empty_rows((*geometry.pixels, max(geometry.growths)), like)
        grad_norm = empty_rows((*geometry.pixels, max(geometry.widths)), like)
        exchanges = geometry.synchronised
        arguments = (
            self.features,
            self.grad_features,
            self.statistics.vector,
            self.sums,
            bottleneck_rooms(geometry, like, self.bottlenecks),
            grad_growth.view(-1),
            grad_norm.view(-1),
            coefficient_scratch(geometry, self.statistics),
        )
        block = block_arguments(layers, geometry, self.seeds, self.statistics.vector)
        for half in reversed(range(first, 2 * len(layers)) if exchanges else (first,)):
            if exchanges and half % 2 == 1:
                self._exchange_features(half // 2 + 1)
            ops.dense_block_backward_(
                *arguments,
                block.parameters,
                block.frozen,
                gradients,
                *block[2:],
                len(self.bottlenecks),
                self.lowest,
                half,
                half + 1 if exchanges else 2 * len(layers),
            )
            if exchanges and half % 2 == 1:
                self._exchange_norm2(half // 2, gradients)
        return [
            gradient
            for index, layer in enumerate(layers)
            for gradient in _layer_gradients(layer, room[index], self.needs[index])
        ]

    def _room(self, index: int) -> list[Tensor]:
        """Room for a layer's gradients, in the order of its parameters; some without elements."""
        needs, layer, start = self.needs[index], self.layers[index], self.geometry.starts[index]
        none = self.sums[:0]
        if index < self.lowest:
            return [none] * 6
        features_needed = self.lowest < index
        conv1_needed = features_needed or any(needs[:3])
        norm1_needed = features_needed or needs[0] or needs[1]
        norm2_needed = conv1_needed or needs[3] or needs[4]
        width = self.geometry.widths[index]
        return [
            *(self._vectors(start) if norm1_needed else (none, none)),
            _like(layer.conv1_weight) if needs[2] else none,
            *(self._vectors(width) if norm2_needed else (none, none)),
            _like(layer.conv2_weight) if needs[5] else none,
        ]

    def _input(self) -> Tensor:
        images, height, width = self.geometry.pixels
        channels = self.geometry.starts[0]
        gradient = empty_channels_last((images, channels, height, width), self.features)
        rows = gradient.permute(0, 2, 3, 1)
        if self.geometry.reduced:
            self._exchange_features(0)
            ops.finish_gradient(
                self.features[..., :channels],
                self.grad_features[..., :channels],
                self.statistics.mean[:channels],
                self.sum_grad[:channels],
                self.sum_grad_x[:channels],
                rows,
            )
        else:
            rows.copy_(self.grad_features[..., :channels])
        return gradient


def _affine_gradients(
    norm: NormSpec, grad_gamma: Tensor | None, grad_beta: Tensor | None
) -> Gradients:
    return [parameter_gradient(norm.weight, grad_gamma), parameter_gradient(norm.bias, grad_beta)]


def _layer_gradients(layer: LayerSpec, room: Sequence[Tensor], needs: LayerNeeds) -> Gradients:
    """What of a layer's gradients somebody wants."""
    parameters = layer_parameters(layer)
    return [
        parameter_gradient(parameter, gradient) if gradient.numel() and need else None
        for parameter, gradient, need in zip(parameters, room, needs, strict=True)
    ]


def _like(weight: Tensor) -> Tensor:
    """Room for a weight's gradient: contiguous, whatever the weight's memory format."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
