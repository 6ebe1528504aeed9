"""The forward of a dense block: every layer writes its channels into one feature buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast import norms, ops, synchronized
from densenet_fast.layout import Scratch, empty_channels_last, empty_rows, row_pitch
from densenet_fast.reference import statistics_dtype
from densenet_fast.reference_block import Coefficients
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

        # Where numbers of values begin in the vector of `Statistics`.
        self.totals = 2 * (self.channels + sum(self.widths))
        self.synchronised = self.group is not None or any(
            group is not None for group in self.bottleneck_groups
        )

    def segment(self, index: int) -> tuple[int, int]:
        """The channels of a segment."""
        return (0 if index == 0 else self.starts[index - 1]), self.starts[index]

    @property
    def reduced(self) -> int:
        """How many of the segments somebody normalises with statistics of the batch."""
        return self._last_reader + 1


class Statistics:
    """Mean and biased variance of all features and of each layer's bottleneck, in one vector.

    Where some are synchronised, the numbers of values that they were taken from are behind them.
    """

    def __init__(self, geometry: Geometry, vector: Tensor) -> None:
        """Name the parts of `vector`, which has `Statistics.size(geometry)` elements."""
        self._geometry = geometry
        self.vector = vector
        channels = geometry.channels
        self.mean, self.var = vector[:channels], vector[channels : 2 * channels]

    @staticmethod
    def size(geometry: Geometry) -> int:
        """Elements needed."""
        totals = 1 + len(geometry.widths) if geometry.synchronised else 0
        return geometry.totals + totals

    def features_total(self) -> Tensor | None:
        """Values [1] of a feature's channel on all ranks; None: not synchronised."""
        at = self._geometry.totals
        return None if self._geometry.group is None else self.vector[at : at + 1]

    def synchronise_features(self, segment: int) -> None:
        """Combine the ranks' statistics of a segment, if its readers are synchronised."""
        geometry, total = self._geometry, self.features_total()
        if geometry.group is not None and total is not None and segment < geometry.reduced:
            start, end = geometry.segment(segment)
            mean, var = self.mean[start:end], self.var[start:end]
            synchronized.combine(geometry.group, geometry.rows, mean, var, total)

    def synchronise(self, half: int) -> None:
        """Combine the ranks' statistics of what a half-layer has written, where wanted."""
        layer = half // 2
        if half % 2 == 1:
            return self.synchronise_features(layer + 1)
        geometry = self._geometry
        group, width = geometry.bottleneck_groups[layer], geometry.widths[layer]
        if group is not None:
            at, total = 2 * (geometry.channels + sum(geometry.widths[:layer])), self.total(layer)
            mean, var = self.vector[at : at + 2 * width].split(width)
            synchronized.combine(group, geometry.rows, mean, var, total)
        return None

    def total(self, layer: int) -> Tensor:
        """Values [1] on all ranks of a channel of a synchronised bottleneck."""
        at = self._geometry.totals + 1 + layer
        return self.vector[at : at + 1]


@dataclass
class Forward:
    """What a forward leaves behind."""

    buffer: Tensor  # the features [N, C, H, W], channels last
    statistics: Tensor  # the vector of `Statistics`
    bottlenecks: list[Tensor]  # those of the last layers, as many as were to be kept


class BlockArguments(NamedTuple):
    """What the block operators of both directions take: see `densenet_fast.reference_block`."""

    parameters: list[Tensor]
    frozen: list[Tensor]
    numbers: list[float]
    seeds: Sequence[int]
    reduced: int


def block_arguments(
    layers: Sequence[LayerSpec], geometry: Geometry, seeds: Sequence[int], vector: Tensor
) -> BlockArguments:
    """The layers as lists of tensors and numbers; vectors in the type and on the device given."""
    dtype, none = vector.dtype, vector.new_empty(0)

    def plain(tensor: Tensor | None) -> Tensor:
        if tensor is None:
            return none
        if tensor.dtype is dtype and tensor.is_contiguous():
            return tensor
        return tensor.to(dtype).contiguous()

    parameters: list[Tensor] = []
    frozen: list[Tensor] = []
    numbers: list[float] = []
    some_frozen = not all(
        layer.norm1.batch_statistics and layer.norm2.batch_statistics for layer in layers
    )
    for layer in layers:
        for norm, weight in (
            (layer.norm1, layer.conv1_weight),
            (layer.norm2, layer.conv2_weight),
        ):
            parameters += (plain(norm.weight), plain(norm.bias), weight)
            numbers.append(norm.eps)
            if some_frozen and norm.batch_statistics:
                frozen += (none, none)
            elif some_frozen:
                frozen += (plain(norm.running_mean), plain(norm.running_var))
        numbers.append(layer.dropout)
    return BlockArguments(parameters, frozen, numbers, seeds, geometry.reduced)


def coefficient_scratch(geometry: Geometry, statistics: Statistics) -> Tensor:
    """Three vectors for each norm's coefficients, and three for a norm2's backward."""
    channels = sum(geometry.starts[:-1]) + sum(geometry.widths) + max(geometry.widths, default=0)
    return statistics.vector.new_empty(3 * channels)


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
    if geometry.reduced:
        start = geometry.starts[0]
        ops.channel_statistics(
            features[..., :start], statistics.mean[:start], statistics.var[:start]
        )
        statistics.synchronise_features(0)
    kept = _kept(geometry, features, keep)
    _run(layers, geometry, statistics, features, kept, seeds)
    result = Forward(buffer, vector, kept)
    output = buffer if tail is None else _tail(tail, features, geometry, statistics)
    norms.record(vector, norm_places(geometry, layers, tail), geometry.rows)
    return output, result


def norm_places(
    geometry: Geometry, layers: Sequence[LayerSpec], tail: Tail | None
) -> Iterator[norms.Place]:
    """Every norm of the block, and where the statistics of what it normalises are, in order."""
    channels = geometry.channels
    at, totals = 2 * channels, geometry.totals
    features = -1 if geometry.group is None else totals
    for index, layer in enumerate(layers):
        width = geometry.widths[index]
        yield norms.Place(layer.norm1, 0, channels, features, geometry.starts[index])
        total = -1 if geometry.bottleneck_groups[index] is None else totals + 1 + index
        yield norms.Place(layer.norm2, at, at + width, total, width)
        at += 2 * width
    if tail is not None:
        yield norms.Place(tail.norm, 0, channels, features, channels)


def _run(
    layers: Sequence[LayerSpec],
    geometry: Geometry,
    statistics: Statistics,
    features: Tensor,
    kept: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    recompute: bool = False,
    last: int | None = None,
) -> None:
    """All half-layers, or those before `last`; the last layers' bottlenecks into `kept`."""
    if not layers:
        return
    bottlenecks = bottleneck_rooms(geometry, features, kept)
    vectors = coefficient_scratch(geometry, statistics)
    arguments = block_arguments(layers, geometry, seeds, statistics.vector)
    halves = 2 * len(layers) if last is None else last
    exchanges = geometry.synchronised and not recompute
    for first in range(halves if exchanges else 1):
        end = first + 1 if exchanges else halves
        ops.dense_block_forward_(
            features, statistics.vector, bottlenecks, vectors, *arguments, recompute, first, end
        )
        if exchanges:
            statistics.synchronise(first)


def bottleneck_rooms(geometry: Geometry, like: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
    """Room for each layer's bottleneck [N, H, W, B]: those `kept`, the last ones, and a scratch."""
    shared = geometry.widths[: len(geometry.widths) - len(kept)]
    scratch = Scratch(geometry.pixels, max(shared, default=0), like)
    return [*map(scratch.take, shared), *kept]


def _kept(geometry: Geometry, like: Tensor, keep: int) -> list[Tensor]:
    """Bottlenecks of their own for the last `keep` layers."""
    widths = geometry.widths[len(geometry.widths) - keep :]
    return [empty_rows((*geometry.pixels, width), like) for width in widths]


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
    kept = _kept(geometry, features, keep)
    # Without a tail nothing reads the last layer's growth (its gradient needs no correction), and
    # without `keep` nothing its bottleneck.
    last = 2 * len(layers)
    if tail is None:
        last -= 1 if keep else 2
    _run(layers, geometry, statistics, features, kept, seeds, recompute=True, last=last)
    return features, kept


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
