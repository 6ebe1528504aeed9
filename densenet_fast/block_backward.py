"""The backward of a dense block, from the last layer to the first, over one gradient buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_fast import norms, ops, synchronized
from densenet_fast.block_forward import (
    Geometry,
    Statistics,
    matrix,
    norm1_coefficients,
    norm2_coefficients,
    recompute_bottleneck,
    recompute_features,
    tail_coefficients,
)
from densenet_fast.layout import Scratch, as_rows, empty_channels_last, row_pitch
from densenet_fast.norms import Coefficients, parameter_gradient
from densenet_fast.specs import Checkpoint, LayerSpec, NormSpec, Tail, TransitionTail

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
        self.first_held = len(layers) - len(bottlenecks)
        self.seeds = seeds
        self.input_needed = input_needed
        self.needs = needs
        wanting = [index for index, need in enumerate(needs) if any(need)]
        # Below this layer nothing needs a gradient.
        self.lowest = 0 if input_needed else min(wanting, default=len(layers))
        self.grad_features = self._gradient_buffer()
        # Sums over the norms done so far, of scale * grad_beta and of scale * rstd * grad_gamma.
        self.sums = statistics.mean.new_zeros(2, geometry.channels)
        self.sum_grad, self.sum_grad_x = self.sums.unbind()

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

    def _defer(
        self, norm: NormSpec, forward: Coefficients, grad_gamma: Tensor, grad_beta: Tensor
    ) -> None:
        """Leave this norm's correction of its channels to `_finish`."""
        if norm.batch_statistics:
            scale, _, _, rstd = forward
            channels = len(scale)
            self.sum_grad[:channels].addcmul_(scale, grad_beta)
            self.sum_grad_x[:channels].addcmul_(scale * rstd, grad_gamma)

    def _finish(self, start: int, end: int, out: Tensor) -> None:
        """The complete gradient of channels all of whose readers are done."""
        sum_grad, sum_grad_x = self._sums(start, end)
        ops.finish_gradient(
            self.features[..., start:end],
            self.grad_features[..., start:end],
            self.statistics.mean[start:end],
            sum_grad,
            sum_grad_x,
            out,
        )

    def _sums(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The deferred sums, as `ops.finish_gradient` divides them by the rows of this process."""
        group, total = self.geometry.group, self.statistics.features_total()
        if group is None or total is None:
            return self.sum_grad[start:end], self.sum_grad_x[start:end]
        sums = self.sums[:, start:end].clone(memory_format=torch.contiguous_format)
        sums = synchronized.mean_over_ranks(group, sums, total).mul_(self.geometry.rows)
        return sums[0], sums[1]

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
        self._defer(tail.norm, forward, grad_gamma, grad_beta)
        affine = _affine_gradients(tail.norm, grad_gamma, grad_beta)
        return affine + gradients

    def _layers(self) -> Gradients:
        geometry = self.geometry
        widest, thickest = max(geometry.widths, default=0), max(geometry.growths, default=0)
        first_held = self.first_held
        grad_bottleneck = Scratch(geometry.pixels, widest, self.features)
        grad_growth = Scratch(geometry.pixels, thickest, self.features)
        recomputed = max(geometry.widths[:first_held], default=0)
        bottleneck = Scratch(geometry.pixels, recomputed, self.features)
        gradients: list[Gradients] = [[None] * 6 for _ in self.layers]
        for index in reversed(range(self.lowest, len(self.layers))):
            width, growth = geometry.widths[index], geometry.growths[index]
            held = index >= first_held
            gradients[index] = self._layer(
                index,
                self.bottlenecks[index - first_held] if held else bottleneck.take(width),
                grad_growth.take(growth),
                grad_bottleneck.take(width),
            )
        return [gradient for layer in gradients for gradient in layer]

    def _layer(
        self, index: int, bottleneck: Tensor, grad_growth: Tensor, grad_norm2: Tensor
    ) -> Gradients:
        layer, needs = self.layers[index], self.needs[index]
        start = self.geometry.starts[index]
        prefix = self.features[..., :start]
        features_needed = self.input_needed or self.lowest < index
        conv1_needed = features_needed or any(needs[:3])

        norm1 = norm1_coefficients(layer, index, self.geometry, self.statistics)
        norm2 = norm2_coefficients(layer, index, self.statistics)
        if index < self.first_held:
            recompute_bottleneck(layer, norm1, prefix, bottleneck)
        grad_growth = self._growth_gradient(index, grad_growth)

        norm2_needed = conv1_needed or needs[3] or needs[4]
        grad_gamma2, grad_beta2 = self._vectors(len(norm2.scale)) if norm2_needed else (None, None)
        grad_conv2 = _like(layer.conv2_weight) if needs[5] else None
        ops.conv3x3_backward(
            grad_growth,
            bottleneck,
            *norm2,
            layer.conv2_weight,
            grad_norm2 if conv1_needed else None,
            grad_gamma2,
            grad_beta2,
            grad_conv2,
        )
        affine2 = _affine_gradients(layer.norm2, grad_gamma2, grad_beta2)
        if not conv1_needed:
            return [None, None, None, *affine2, grad_conv2]
        assert grad_gamma2 is not None
        assert grad_beta2 is not None

        rows = norms.gradient_coefficients(
            layer.norm2,
            norm2,
            grad_gamma2,
            grad_beta2,
            self.geometry.rows,
            self.statistics.bottleneck_total(index),
        )
        weight = matrix(layer.conv1_weight)
        norm1_needed = features_needed or needs[0] or needs[1]
        grad_gamma1, grad_beta1 = self._vectors(start) if norm1_needed else (None, None)
        grad_conv1 = _like(weight) if needs[2] else None
        ops.conv1x1_backward(
            grad_norm2,
            bottleneck,
            rows,
            prefix,
            *norm1,
            weight,
            self.grad_features[..., :start] if features_needed else None,
            grad_gamma1,
            grad_beta1,
            grad_conv1,
        )
        if features_needed and grad_gamma1 is not None and grad_beta1 is not None:
            self._defer(layer.norm1, norm1, grad_gamma1, grad_beta1)
        return [
            *_affine_gradients(layer.norm1, grad_gamma1, grad_beta1),
            None if grad_conv1 is None else grad_conv1[..., None, None],
            *affine2,
            grad_conv2,
        ]

    def _growth_gradient(self, index: int, out: Tensor) -> Tensor:
        """The gradient of the 3x3 convolution's output: corrected, and through the dropout."""
        start, end = self.geometry.starts[index : index + 2]
        if self.geometry.reduced(index + 1):
            self._finish(start, end, out)
        else:
            # No readers are left, so the buffer's own channels can be worked on in place.
            out = self.grad_features[..., start:end]
        if self.layers[index].dropout:
            ops.dropout_(out, self.seeds[index], self.layers[index].dropout)
        return out

    def _input(self) -> Tensor:
        images, height, width = self.geometry.pixels
        channels = self.geometry.starts[0]
        gradient = empty_channels_last((images, channels, height, width), self.features)
        rows = gradient.permute(0, 2, 3, 1)
        if self.geometry.reduced(0):
            self._finish(0, channels, rows)
        else:
            rows.copy_(self.grad_features[..., :channels])
        return gradient


def _affine_gradients(
    norm: NormSpec, grad_gamma: Tensor | None, grad_beta: Tensor | None
) -> Gradients:
    return [parameter_gradient(norm.weight, grad_gamma), parameter_gradient(norm.bias, grad_beta)]


def _like(weight: Tensor) -> Tensor:
    """Room for a weight's gradient: contiguous, whatever the weight's memory format."""
    return torch.empty_like(weight, memory_format=torch.contiguous_format)
