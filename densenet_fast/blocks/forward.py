"""The forward of a dense block: every layer writes its channels into one feature buffer."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import norms, synchronized
from densenet_fast.blocks.specs import NormSpec, Settings, Tensors
from densenet_fast.operators.reference_block import Coefficients
from densenet_fast.operators.rows import (
    Scratch,
    empty_channels_last,
    empty_rows,
    row_pitch,
    rows_of,
    statistics_dtype,
)


class Geometry:
    """Sizes of a block, and which channels somebody normalises with statistics of the batch.

    Segment 0 of the features is the block's input, segment l + 1 the growth of layer l. `starts[l]`
    channels are the input of layer l; `starts[-1]` are all.
    """

    def __init__(self, shape: Sequence[int], parameters: Tensors, settings: Settings) -> None:
        """Describe the block of these parameters on an input [N, C0, *size]."""
        images, channels, *size = shape
        self.layers = len(settings.dropout)
        weights = parameters[2 : 6 * self.layers : 3]
        outputs = [0 if weight is None else weight.shape[0] for weight in weights]
        self.pixels = (images, *size)
        self.rows = math.prod(self.pixels)
        self.widths, self.growths = outputs[::2], outputs[1::2]  # no bottleneck: width 0
        self.starts = [channels]
        for growth in self.growths:
            self.starts.append(self.starts[-1] + growth)
        self.channels = self.starts[-1]
        # Where numbers of values begin in the vector of `Statistics`.
        self.totals = 2 * (self.channels + sum(self.widths))
        # A norm of layer l reads segments 0 to l, a tail's norm all of them.
        of_features = [2 * layer + (not width) for layer, width in enumerate(self.widths)]
        of_features += range(2 * self.layers, len(settings.batch_statistics))
        reading = [settings.batch_statistics[norm] for norm in of_features]
        readers = [index for index, of_batch in enumerate(reading) if of_batch]
        # How many of the segments somebody normalises with statistics of the batch.
        self.reduced = readers[-1] + 1 if readers else 0
        # Whose statistics: those of the features are one group's, as `check_block` has seen to.
        groups = settings.groups
        self.synchronised = bool(groups)
        self.group = groups[of_features[readers[0]]] if groups and readers else ""
        self.bottleneck_groups = [
            groups[2 * layer + 1] if groups and width else ""
            for layer, width in enumerate(self.widths)
        ]

    def segment(self, index: int) -> tuple[int, int]:
        """The channels of a segment."""
        return (0 if index == 0 else self.starts[index - 1]), self.starts[index]


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
        return geometry.totals + (1 + geometry.layers if geometry.synchronised else 0)

    def features_total(self) -> Tensor:
        """Values [1] of a feature's channel on all ranks, where features are synchronised."""
        return self.vector[self._geometry.totals :][:1]

    def bottleneck_total(self, layer: int) -> Tensor:
        """Values [1] of a channel of a synchronised bottleneck on all ranks."""
        return self.vector[self._geometry.totals + 1 + layer :][:1]

    def synchronise_features(self, segment: int) -> None:
        """Combine the ranks' statistics of a segment, if its readers are synchronised."""
        geometry = self._geometry
        if geometry.group and segment < geometry.reduced:
            start, end = geometry.segment(segment)
            mean, var = self.mean[start:end], self.var[start:end]
            total = self.features_total()
            synchronized.combine(geometry.group, geometry.rows, mean, var, total)

    def synchronise(self, half: int) -> None:
        """Combine the ranks' statistics of what a half-layer has written, where wanted."""
        geometry, layer = self._geometry, half // 2
        group = geometry.bottleneck_groups[layer]
        if half % 2 == 1:
            self.synchronise_features(layer + 1)
        elif group:
            width = geometry.widths[layer]
            at = 2 * (geometry.channels + sum(geometry.widths[:layer]))
            mean, var = self.vector[at : at + 2 * width].split(width)
            total = self.bottleneck_total(layer)
            synchronized.combine(group, geometry.rows, mean, var, total)


_dtype = operator.attrgetter("dtype")


def _readable(vectors: list[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether operators can read these as they are: asked without a line of Python for each."""
    given: Any = vectors
    return (
        type(None) not in set(map(type, given))
        and set(map(_dtype, given)) <= {dtype}
        and all(map(Tensor.is_contiguous, given))
    )


class BlockArguments(NamedTuple):
    """What the block operators of both directions take: see `operators.reference_block`."""

    parameters: list[Tensor]
    frozen: list[Tensor]
    numbers: list[float]
    seeds: Sequence[int]
    reduced: int


class Block:
    """One call of a block: its tensors and numbers, for features of one type on one device."""

    def __init__(
        self,
        shape: Sequence[int],
        parameters: Tensors,
        buffers: Tensors,
        seeds: Tensor | None,
        settings: Settings,
    ) -> None:
        """Describe a block on an input [N, C0, *size]; `seeds` are those of layers with dropout."""
        self.parameters, self.buffers, self.settings = parameters, buffers, settings
        self.geometry = Geometry(shape, parameters, settings)
        drawn = iter([] if seeds is None else seeds.tolist())
        self.seeds = [next(drawn) if dropout > 0 else 0 for dropout in settings.dropout]
        layers = self.geometry.layers
        self.biases = parameters[6 * layers : 7 * layers]
        self.biased = any(bias is not None for bias in self.biases)

    def arguments(self, vector: Tensor) -> BlockArguments:
        """Lists for the operators, their vectors in the type and on the device of `vector`."""
        dtype, none, layers = vector.dtype, vector.new_empty(0), self.geometry.layers

        def plain(tensors: list[Tensor | None]) -> Any:
            if _readable(tensors, dtype):
                return tensors
            return [none if t is None else norms.plain(t, dtype) for t in tensors]

        parameters: Any = list(self.parameters[: 6 * layers])
        for at in (slice(0, None, 3), slice(1, None, 3)):
            parameters[at] = plain(parameters[at])
        if not all(self.geometry.widths):
            parameters[2::6] = [none if weight is None else weight for weight in parameters[2::6]]
        frozen: list[Tensor] = []
        if not all(self.settings.batch_statistics[: 2 * layers]):
            frozen = plain(list(self.buffers[: 4 * layers]))
        settings = self.settings
        eps = settings.eps[: 2 * layers]
        # Behind a bias dropout is not the operators' (see `_add_bias`).
        of_operators = zip(settings.dropout, self.biases, strict=True)
        dropout = [0.0 if bias is not None else rate for rate, bias in of_operators]
        whole = map(float, settings.whole_channels)
        of_layers = zip(eps[::2], eps[1::2], dropout, whole, strict=True)
        numbers = [number for of_layer in of_layers for number in of_layer]
        return BlockArguments(parameters, frozen, numbers, self.seeds, self.geometry.reduced)

    def scratch(self, vector: Tensor) -> Tensor:
        """Room for coefficients: three of each norm's channels, three of a norm2's backward."""
        geometry = self.geometry
        widths = sum(geometry.widths) + max(geometry.widths, default=0)
        return vector.new_empty(3 * (sum(geometry.starts[:-1]) + widths))

    def rooms(self, like: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
        """Room for each layer's bottleneck [N, *size, B]: `kept`, the last ones, and a scratch."""
        geometry = self.geometry
        shared = geometry.widths[: geometry.layers - len(kept)]
        scratch = Scratch(geometry.pixels, max(shared, default=0), like)
        return [*map(scratch.take, shared), *kept]

    def tail_coefficients(self, statistics: Statistics) -> Coefficients:
        """The norm behind the block, over all its features."""
        weight, bias = self.parameters[7 * self.geometry.layers :][:2]
        mean, var = self.buffers[-2:]
        if mean is None or var is None:
            mean, var = statistics.mean, statistics.var
        return norms.coefficients(weight, bias, self.settings.eps[-1], mean, var, statistics.vector)

    def run(
        self,
        statistics: Statistics,
        features: Tensor,
        kept: Sequence[Tensor],
        *,
        recompute: bool = False,
        last: int | None = None,
    ) -> None:
        """All half-layers, or those before `last`; the last layers' bottlenecks into `kept`."""
        halves = 2 * self.geometry.layers if last is None else last
        if not halves:
            return
        vector = statistics.vector
        given = (self.rooms(features, kept), self.scratch(vector), *self.arguments(vector))
        exchanges = self.geometry.synchronised and not recompute
        at_once = 1 if exchanges else 2 if self.biased else halves
        for first in range(0, halves, at_once):
            end = min(first + at_once, halves)
            operators.dense_block_forward_(features, vector, *given, recompute, first, end)
            if end % 2 == 0:
                self._add_bias(end // 2 - 1, features, statistics, reduce=not recompute)
            if exchanges:
                statistics.synchronise(first)

    def _add_bias(
        self, layer: int, features: Tensor, statistics: Statistics, *, reduce: bool
    ) -> None:
        """A layer's bias, if it has one, and what comes behind it: dropout and statistics."""
        bias = self.biases[layer]
        if bias is None:
            return
        start, end = self.geometry.segment(layer + 1)
        growth = features[..., start:end].add_(bias)
        self.drop_(layer, growth)
        if reduce and layer + 1 < self.geometry.reduced:
            operators.channel_statistics(
                growth, statistics.mean[start:end], statistics.var[start:end]
            )

    def drop_(self, layer: int, growth: Tensor) -> None:
        """Dropout of a layer that has a bias, or of the gradient of its output."""
        settings = self.settings
        if settings.dropout[layer] > 0:
            whole = settings.whole_channels[layer]
            operators.dropout_(growth, self.seeds[layer], settings.dropout[layer], whole)


def forward(input: Tensor, block: Block) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The block's output, the vector of `Statistics`, and what a backward reads besides.

    That is the feature buffer [N, C, *size], where there is a tail and the block is not made again,
    and the bottlenecks that are held.
    """
    geometry, settings = block.geometry, block.settings
    vector = torch.empty(
        Statistics.size(geometry), dtype=statistics_dtype(input.dtype), device=input.device
    )
    statistics = Statistics(geometry, vector)
    has_tail = settings.tail != "none"
    buffer, features = feature_buffer(input, geometry, padded=has_tail)
    if geometry.reduced:
        start = geometry.starts[0]
        given = features[..., :start]
        operators.channel_statistics(given, statistics.mean[:start], statistics.var[:start])
        statistics.synchronise_features(0)
    kept = held(geometry, features, 0 if settings.checkpoint == "block" else settings.hold)
    block.run(statistics, features, kept)
    if not has_tail:
        return buffer, vector, kept
    output = _tail(block, features, statistics)
    return output, vector, kept if settings.checkpoint == "block" else [buffer, *kept]


def norm_places(geometry: Geometry, norm_specs: Sequence[NormSpec]) -> Iterator[norms.Place]:
    """Every norm of the block, and where the statistics of what it normalises are, in order."""
    channels, totals = geometry.channels, geometry.totals
    features = totals if geometry.group else -1
    at = 2 * channels
    for layer, width in enumerate(geometry.widths):
        norm1, norm2 = norm_specs[2 * layer : 2 * layer + 2]
        if not width:
            yield norms.Place(norm2, 0, channels, features, geometry.starts[layer])
            continue
        yield norms.Place(norm1, 0, channels, features, geometry.starts[layer])
        total = totals + 1 + layer if geometry.bottleneck_groups[layer] else -1
        yield norms.Place(norm2, at, at + width, total, width)
        at += 2 * width
    for norm in norm_specs[2 * geometry.layers :]:
        yield norms.Place(norm, 0, channels, features, channels)


def held(geometry: Geometry, like: Tensor, hold: int) -> list[Tensor]:
    """Bottlenecks of their own for the last `hold` layers."""
    widths = geometry.widths[geometry.layers - hold :]
    return [empty_rows((*geometry.pixels, width), like) for width in widths]


def feature_buffer(input: Tensor, geometry: Geometry, *, padded: bool) -> tuple[Tensor, Tensor]:
    """The buffer [N, C, *size] and its rows [N, *size, C], the block's input in the first channels.

    Rows are padded only where the buffer never leaves the block: others want them contiguous.
    """
    images, *size = geometry.pixels
    pitch = geometry.channels
    if padded:
        pitch = row_pitch(pitch, input.itemsize, cuda=input.is_cuda)
    buffer = empty_channels_last((images, geometry.channels, *size), input, pitch)
    features = rows_of(buffer)
    features[..., : geometry.starts[0]].copy_(rows_of(input))
    return buffer, features


def recompute_features(
    input: Tensor, block: Block, statistics: Statistics
) -> tuple[Tensor, list[Tensor]]:
    """The rows of the features once more, [N, *size, C]: nothing is reduced, nothing updated.

    And the bottlenecks that are held.
    """
    geometry, hold = block.geometry, block.settings.hold
    _, features = feature_buffer(input, geometry, padded=True)
    kept = held(geometry, features, hold)
    # Without a tail nothing reads the last layer's growth (its gradient needs no correction), and
    # if it is not held nothing its bottleneck.
    last = 2 * geometry.layers
    if block.settings.tail == "none":
        last = max(0, last - (1 if hold else 2))
    block.run(statistics, features, kept, recompute=True, last=last)
    return features, kept


def _tail(block: Block, features: Tensor, statistics: Statistics) -> Tensor:
    scale, shift, _, _ = block.tail_coefficients(statistics)
    images, *size = block.geometry.pixels
    if block.settings.tail == "average":
        out = features.new_empty(images, block.geometry.channels)
        operators.norm_relu_avgpool_forward(features, scale, shift, out)
        return out
    weight = matrix(block.parameters[-1])
    out = empty_channels_last((images, len(weight), *halved(size)), features)
    linear = block.settings.linear
    operators.transition_forward(features, scale, shift, weight, rows_of(out), None, None, linear)
    return out


def halved(size: Sequence[int]) -> list[int]:
    """The size behind a transition's pooling."""
    return [length // 2 for length in size]


def matrix(weight: Tensor | None) -> Tensor:
    """A 1x1 convolution's weight [B, C, 1, ...] as [B, C]."""
    assert weight is not None
    return weight.flatten(1)
