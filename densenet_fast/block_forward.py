"""The forward of a dense block: every layer writes its channels into one feature buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from densenet_fast import norms, ops, synchronized
from densenet_fast.layout import (
    Scratch,
    empty_channels_last,
    empty_rows,
    row_pitch,
    statistics_dtype,
)
from densenet_fast.norms import Coefficients, Seen
from densenet_fast.specs import AvgPoolTail, LayerSpec, NormSpec, Tail, TransitionTail


class Geometry:
    """Sizes of a block, and which channels somebody normalises with statistics of the batch.

    Segment 0 of the features is the block's input, segment l + 1 the growth of layer l. `starts[l]`
    channels are the input of layer l; `starts[-1]` are all.
    """

    def __init__(
        self, shape: Sequence[int], layers: Sequence[LayerSpec], tail: Tail | None
    ) -> None:
        """Describe the block of `layers` and `tail` on an input [N, C0, H, W]."""
        images, channels, height, width = shape
        self.pixels = (images, height, width)
        self.rows = images * height * width
        self.growths = [layer.conv2_weight.shape[0] for layer in layers]
        self.widths = [layer.conv1_weight.shape[0] for layer in layers]
        self.starts = [channels]
        for growth in self.growths:
            self.starts.append(self.starts[-1] + growth)
        self.channels = self.starts[-1]
        reading = [layer.norm1 for layer in layers] + ([] if tail is None else [tail.norm])
        readers = [index for index, norm in enumerate(reading) if norm.batch_statistics]
        # Layer l reads segments 0 to l, so all segments up to the last reader need statistics.
        self._last_reader = readers[-1] if readers else -1
        # Whose statistics: those of the features are one group's, as `check_block` has seen to.
        self.group = reading[readers[0]].group if readers else None
        self.bottleneck_groups = [layer.norm2.group for layer in layers]

    def reduced(self, segment: int) -> bool:
        """Whether some norm takes the batch's statistics of this segment."""
        return segment <= self._last_reader


class Statistics:
    """Mean and biased variance of all features and of each layer's bottleneck, in one vector.

    Where some are synchronised, the numbers of values that they were taken from are behind them.
    """

    def __init__(self, geometry: Geometry, vector: Tensor) -> None:
        """Name the parts of `vector`, which has `Statistics.size(geometry)` elements."""
        self._geometry = geometry
        sizes = [geometry.channels] * 2
        for width in geometry.widths:
            sizes += [width] * 2
        parts = vector.split([*sizes, *[1] * _totals(geometry)])
        self.mean, self.var = parts[:2]
        self._bottleneck = parts[2 : len(sizes)]
        self._totals = parts[len(sizes) :]

    @staticmethod
    def size(geometry: Geometry) -> int:
        """Elements needed."""
        return 2 * (geometry.channels + sum(geometry.widths)) + _totals(geometry)

    def features(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of some channels of the features."""
        return self.mean[start:end], self.var[start:end]

    def bottleneck(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer's bottleneck."""
        return self._bottleneck[2 * layer], self._bottleneck[2 * layer + 1]

    def features_total(self) -> Tensor | None:
        """Values [1] of a feature's channel on all ranks; None: not synchronised."""
        return None if self._geometry.group is None else self._totals[0]

    def bottleneck_total(self, layer: int) -> Tensor | None:
        """Values [1] of a bottleneck's channel on all ranks; None: not synchronised."""
        group = self._geometry.bottleneck_groups[layer]
        return None if group is None else self._totals[1 + layer]

    def synchronise_features(self, start: int, end: int) -> None:
        """Combine the ranks' statistics of some channels, if their readers are synchronised."""
        group, total = self._geometry.group, self.features_total()
        if group is not None and total is not None:
            synchronized.combine(group, self._geometry.rows, *self.features(start, end), total)

    def synchronise_bottleneck(self, layer: int) -> None:
        """Combine the ranks' statistics of a layer's bottleneck, if its norm2 is synchronised."""
        group, total = self._geometry.bottleneck_groups[layer], self.bottleneck_total(layer)
        if group is not None and total is not None:
            synchronized.combine(group, self._geometry.rows, *self.bottleneck(layer), total)


def _totals(geometry: Geometry) -> int:
    """Numbers of values to keep: that of the features and of each layer's bottleneck, or none."""
    groups = [geometry.group, *geometry.bottleneck_groups]
    return 0 if all(group is None for group in groups) else len(groups)


@dataclass
class Forward:
    """What a forward leaves behind."""

    buffer: Tensor  # the features [N, C, H, W], channels last
    statistics: Tensor  # the vector of `Statistics`
    bottlenecks: list[Tensor]  # those of the last layers, as many as were to be kept


def norm1_coefficients(
    layer: LayerSpec, index: int, geometry: Geometry, statistics: Statistics
) -> Coefficients:
    """Norm1 of a layer over all features before it."""
    return norms.coefficients(layer.norm1, *statistics.features(0, geometry.starts[index]))


def norm2_coefficients(layer: LayerSpec, index: int, statistics: Statistics) -> Coefficients:
    """Norm2 of a layer over its bottleneck."""
    return norms.coefficients(layer.norm2, *statistics.bottleneck(index))


def matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight [B, C, 1, 1] as [B, C]."""
    return weight.flatten(1)


def forward(
    input: Tensor,
    layers: Sequence[LayerSpec],
    tail: Tail | None,
    geometry: Geometry,
    seeds: Sequence[int],
    *,
    keep: int,
) -> tuple[Tensor, Forward]:
    """The block's output, and what a backward may want. At last updates running statistics.

    Of the last `keep` layers the bottlenecks are kept.
    """
    vector = torch.empty(
        Statistics.size(geometry), dtype=statistics_dtype(input.dtype), device=input.device
    )
    statistics = Statistics(geometry, vector)
    buffer, features = _feature_buffer(input, geometry, padded=tail is not None)
    if geometry.reduced(0):
        start = geometry.starts[0]
        ops.channel_statistics(features[..., :start], *statistics.features(0, start))
        statistics.synchronise_features(0, start)
    bottlenecks = _run_layers(layers, geometry, statistics, features, seeds, keep)
    result = Forward(buffer, vector, bottlenecks)
    output = buffer if tail is None else _tail(tail, features, geometry, statistics)
    norms.record(*norms.updates(_seen(layers, tail, geometry, statistics), geometry.rows))
    return output, result


def _seen(
    layers: Sequence[LayerSpec], tail: Tail | None, geometry: Geometry, statistics: Statistics
) -> Iterator[Seen]:
    """Every norm of the block with the statistics of what it normalises, in order."""
    total = statistics.features_total()
    for index, layer in enumerate(layers):
        yield Seen(layer.norm1, *statistics.features(0, geometry.starts[index]), total)
        yield Seen(layer.norm2, *statistics.bottleneck(index), statistics.bottleneck_total(index))
    if tail is not None:
        yield Seen(tail.norm, statistics.mean, statistics.var, total)


def _run_layers(
    layers: Sequence[LayerSpec],
    geometry: Geometry,
    statistics: Statistics,
    features: Tensor,
    seeds: Sequence[int],
    keep: int,
) -> list[Tensor]:
    """All layers for the first time; the bottlenecks of the last `keep`."""
    bottlenecks = Bottlenecks(geometry, features, keep)
    for index, layer in enumerate(layers):
        bottleneck = bottlenecks.take(index)
        _first_layer_run(layer, index, geometry, statistics, features, bottleneck, seeds[index])
    return bottlenecks.kept


class Bottlenecks:
    """Room for each layer's bottleneck [N, H, W, B]: its own where kept, else one scratch."""

    def __init__(self, geometry: Geometry, like: Tensor, keep: int) -> None:
        """Reserve the scratch that all layers but the last `keep` share."""
        self._geometry = geometry
        self._like = like
        self._first_kept = len(geometry.widths) - keep
        self._scratch = Scratch(
            geometry.pixels, max(geometry.widths[: self._first_kept], default=0), like
        )
        self.kept: list[Tensor] = []

    def take(self, layer: int) -> Tensor:
        """Room for the next layer's bottleneck; layers must come in order."""
        width = self._geometry.widths[layer]
        if layer < self._first_kept:
            return self._scratch.take(width)
        self.kept.append(empty_rows((*self._geometry.pixels, width), self._like))
        return self.kept[-1]


def _feature_buffer(input: Tensor, geometry: Geometry, *, padded: bool) -> tuple[Tensor, Tensor]:
    """The buffer [N, C, H, W] and its rows [N, H, W, C], the block's input in the first channels.

    Rows are padded only where the buffer never leaves the block: others want them contiguous.
    """
    images, height, width = geometry.pixels
    pitch = geometry.channels
    if padded:
        pitch = row_pitch(pitch, input.itemsize, cuda=input.is_cuda)
    shape = (images, geometry.channels, height, width)
    buffer = empty_channels_last(shape, input, pitch)
    features = buffer.permute(0, 2, 3, 1)
    features[..., : geometry.starts[0]].copy_(input.permute(0, 2, 3, 1))
    return buffer, features


def _first_layer_run(
    layer: LayerSpec,
    index: int,
    geometry: Geometry,
    statistics: Statistics,
    features: Tensor,
    bottleneck: Tensor,
    seed: int,
) -> None:
    """One layer, its output's statistics reduced."""
    start, end = geometry.starts[index : index + 2]
    prefix = features[..., :start]
    scale, shift, _, _ = norm1_coefficients(layer, index, geometry, statistics)
    mean, var = statistics.bottleneck(index)
    wanted = (mean, var) if layer.norm2.batch_statistics else (None, None)
    ops.conv1x1_forward(prefix, scale, shift, matrix(layer.conv1_weight), bottleneck, *wanted)
    statistics.synchronise_bottleneck(index)

    scale, shift, _, _ = norm2_coefficients(layer, index, statistics)
    growth = features[..., start:end]
    wanted = statistics.features(start, end) if geometry.reduced(index + 1) else (None, None)
    if not layer.dropout:
        ops.conv3x3_forward(bottleneck, scale, shift, layer.conv2_weight, growth, *wanted)
    else:
        ops.conv3x3_forward(bottleneck, scale, shift, layer.conv2_weight, growth, None, None)
        ops.dropout_(growth, seed, layer.dropout)
        if wanted[0] is not None and wanted[1] is not None:
            ops.channel_statistics(growth, *wanted)
    if geometry.reduced(index + 1):
        statistics.synchronise_features(start, end)


def recompute_bottleneck(
    layer: LayerSpec, norm1: Coefficients, prefix: Tensor, bottleneck: Tensor
) -> None:
    """The bottleneck once more, from the statistics of the first run."""
    weight = matrix(layer.conv1_weight)
    ops.conv1x1_forward(prefix, norm1.scale, norm1.shift, weight, bottleneck, None, None)


def recompute_features(
    input: Tensor,
    layers: Sequence[LayerSpec],
    tail: Tail | None,
    geometry: Geometry,
    statistics: Statistics,
    seeds: Sequence[int],
    keep: int,
) -> tuple[Tensor, list[Tensor]]:
    """The rows of the features once more, [N, H, W, C]: nothing is reduced, nothing updated.

    And the bottlenecks of the last `keep` layers.
    """
    _, features = _feature_buffer(input, geometry, padded=True)
    bottlenecks = Bottlenecks(geometry, features, keep)
    # Without a tail nothing reads the last layer's growth: its gradient needs no correction.
    read = len(layers) - (tail is None)
    for index, layer in enumerate(layers if keep else layers[:read]):
        start, end = geometry.starts[index : index + 2]
        bottleneck = bottlenecks.take(index)
        norm1 = norm1_coefficients(layer, index, geometry, statistics)
        recompute_bottleneck(layer, norm1, features[..., :start], bottleneck)
        if index == read:
            break
        scale, shift, _, _ = norm2_coefficients(layer, index, statistics)
        growth = features[..., start:end]
        ops.conv3x3_forward(bottleneck, scale, shift, layer.conv2_weight, growth, None, None)
        if layer.dropout:
            ops.dropout_(growth, seeds[index], layer.dropout)
    return features, bottlenecks.kept


def tail_coefficients(norm: NormSpec, statistics: Statistics) -> Coefficients:
    """The norm behind the block, over all its features."""
    return norms.coefficients(norm, statistics.mean, statistics.var)


def _tail(tail: Tail, features: Tensor, geometry: Geometry, statistics: Statistics) -> Tensor:
    scale, shift, _, _ = tail_coefficients(tail.norm, statistics)
    images, height, width = geometry.pixels
    if isinstance(tail, AvgPoolTail):
        out = torch.empty(images, geometry.channels, dtype=features.dtype, device=features.device)
        ops.norm_relu_avgpool_forward(features, scale, shift, out)
        return out
    assert isinstance(tail, TransitionTail)
    weight = matrix(tail.conv_weight)
    out = empty_channels_last((images, len(weight), height // 2, width // 2), features)
    ops.transition_forward(features, scale, shift, weight, out.permute(0, 2, 3, 1), None, None)
    return out
