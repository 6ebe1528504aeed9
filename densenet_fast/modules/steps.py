"""The steps that a forward consists of: a module called, or several modules fused into one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.blocks import norms, stem_convolution, synchronized
from densenet_fast.blocks.dense_block import (
    FlatBlock,
    conv_stem,
    fused,
    released,
    stem_norm_relu_maxpool,
)
from densenet_fast.blocks.max_transition import max_transition
from densenet_fast.blocks.specs import (
    NO_NORM,
    AvgPoolTail,
    Checkpoint,
    ConvGeometry,
    LayerSpec,
    MaxTransition,
    NormSpec,
    Tail,
    TransitionTail,
)
from densenet_fast.modules.dimensions import Conv, Norm
from densenet_fast.modules.eligibility import (
    FROZEN_NORMS,
    leaves_input,
    parameter,
    setting,
    weight_shape,
)
from densenet_fast.modules.layer_parts import LayerParts, TailParts

FusedRun = list[LayerParts]
Segment = FusedRun | nn.Module
_NOTHING: FusedRun = []  # always the same, as what is made of a run goes by it


def norm_spec(norm: Norm, counted: list[Tensor]) -> NormSpec:
    """What `norm` would do if it were called now, as in its class's `forward`.

    `counted` are the counters that the same step will have counted in before, to which the norm's
    own is added.
    """
    # Every norm in every step: nn.Module.__getattr__ would be most of the work.
    state = norm.__dict__
    buffers = state["_buffers"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    momentum = counter = None
    frozen = type(norm) in FROZEN_NORMS
    if not frozen and state["training"] and setting(state, "track_running_stats"):
        momentum = state["momentum"]
        counter = buffers["num_batches_tracked"]
        if counter is not None:
            counted.append(counter)
            if momentum is None:
                momentum = 1.0 / (int(counter) + sum(one is counter for one in counted))
        # Neither a momentum nor a counter: BatchNorm leaves the running statistics alone then.
        if mean is None:
            momentum = None
    return NormSpec(
        weight=parameter(state, "weight"),
        bias=parameter(state, "bias"),
        running_mean=mean,
        running_var=var,
        eps=state["eps"],
        batch_statistics=not frozen and (state["training"] or mean is None),
        momentum=momentum,
        group=synchronized.group_of(norm) if type(norm) is nn.SyncBatchNorm else "",
        counter=counter,
    )


class Reordering:
    """Parameters for features in the order in which a block adds them.

    A layer may read them in another one, the newest first for example: of what it does with each
    channel, copies in the block's order compute the same, and autograd leads back from them.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        """Channels of the block's input and of what every layer adds."""
        self._widths = tuple(widths)
        self._running: list[tuple[Tensor, Tensor, Tensor]] = []
        self.unused = True

    def layer(self, spec: LayerSpec, order: Sequence[int] | None) -> LayerSpec:
        """The layer, whose first norm and convolution read the features in `order`."""
        if order is None:
            return spec
        if spec.conv1_weight is None:
            norm, weight = self._reordered(spec.norm2, spec.conv2_weight, order)
            return spec._replace(norm2=norm, conv2_weight=weight)
        norm, weight = self._reordered(spec.norm1, spec.conv1_weight, order)
        return spec._replace(norm1=norm, conv1_weight=weight)

    def transition(self, spec: TransitionTail, order: Sequence[int] | None) -> TransitionTail:
        """The transition, likewise."""
        if order is None:
            return spec
        norm, weight = self._reordered(spec.norm, spec.conv_weight, order)
        return spec._replace(norm=norm, conv_weight=weight)

    def _reordered(
        self, norm: NormSpec, weight: Tensor, order: Sequence[int]
    ) -> tuple[NormSpec, Tensor]:
        self.unused = False
        places = _kept_places if not torch.compiler.is_compiling() else _places
        index = torch.tensor(places(self._widths, tuple(order)), device=weight.device)
        vectors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        copies = [one if one is None else one.index_select(0, index) for one in vectors]
        if norm.momentum is not None:
            for own, copied in zip(vectors[2:], copies[2:], strict=True):
                assert own is not None
                assert copied is not None
                self._running.append((own, copied, index))
        scale, shift, mean, var = copies
        made = norm._replace(weight=scale, bias=shift, running_mean=mean, running_var=var)
        return made, weight.index_select(1, index)

    def give_back(self) -> None:
        """Running statistics, which a step has updated in the copies, to the norms."""
        with torch.no_grad():
            for own, copied, index in self._running:
                own.index_copy_(0, index, copied)


def _places(widths: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """For each channel of the features, its place in the order in which the pieces are read."""
    starts, start = {}, 0
    for piece in order:
        starts[piece] = start
        start += widths[piece]
    return [starts[piece] + i for piece in sorted(order) for i in range(widths[piece])]


_kept_places = lru_cache(1024)(_places)  # Dynamo traces through caches, and says so.


@dataclass
class ModuleStep:
    """A module, called as such: its hooks run, its type decides.

    One that may hand its input to others' code gets it in `memory_format`, and may write to it.
    """

    module: nn.Module
    memory_format: torch.memory_format = torch.preserve_format

    def run(self, input: Tensor) -> Tensor:
        """The module's output."""
        if not leaves_input(self.module):
            input = released(input, self.memory_format)
        return self.module(input)


@dataclass
class ConvStep:
    """A convolution in front of a fused step, which wants its input's channels innermost.

    A weight in that layout makes the convolution write its output so, without another copy of the
    images: autograd keeps them as they came.
    """

    module: Conv

    def run(self, input: Tensor) -> Tensor:
        """The module's output."""
        state = self.module.__dict__
        weight, bias = parameter(state, "weight"), parameter(state, "bias")
        return stem_convolution.module_forward(self.module, input, weight, bias)


@dataclass
class StemStep:
    """norm0, relu0 and pool0 as one node, with the convolution where that is recomputed."""

    norm: Norm
    conv: Conv | None = None

    def run(self, input: Tensor) -> Tensor:
        """The pooled features."""
        norm = norm_spec(self.norm, [])
        if self.conv is None:
            return stem_norm_relu_maxpool(input, norm)
        conv: Any = self.conv.__dict__
        geometry = ConvGeometry(conv["stride"], conv["padding"], conv["dilation"], conv["groups"])
        return conv_stem(input, parameter(conv, "weight"), parameter(conv, "bias"), geometry, norm)


@dataclass
class MaxTransitionStep:
    """norm, ReLU, 1×1 convolution, dropout and 2×2 maximum as one node."""

    norm: Norm
    conv: Conv
    dropout: float = 0.0
    whole_channels: bool = False

    def run(self, input: Tensor) -> Tensor:
        """The pooled features."""
        norm, conv = norm_spec(self.norm, []), self.conv.__dict__
        weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
        spec = MaxTransition(norm, weight, bias, self.dropout, self.whole_channels)
        return max_transition(input, spec)


@dataclass
class DenseStep:
    """A block's segments, and what is fused behind the last of them.

    `order` are the pieces of the features that are returned (0 is the input, i what layer i adds),
    where these are not all as they were added; of the last run, and without a tail.

    A segment is a run of layers for one fused node, or a layer to be called as a module. `tail` is
    of a transition, or the norm of norm, ReLU and average over all pixels. `hold` counts the last
    layers whose bottlenecks are held for the backward (see `densenet_fast.blocks.memory_plan`). A
    layer that is called returns the features so far with its own behind them, or with `lists` its
    own, from a list of the block's input and what every layer before has added. It gets them as a
    `ModuleStep` does.
    """

    segments: Sequence[Segment]
    checkpoint: Checkpoint
    tail: TailParts | None = None
    hold: int = 0
    lists: bool = False
    memory_format: torch.memory_format = torch.preserve_format
    order: Sequence[int] | None = None
    _specs: dict[int, FlatBlock] = field(default_factory=dict, init=False, repr=False)

    @property
    def fused_throughout(self) -> bool:
        """Whether no layer is called as a module."""
        return all(isinstance(segment, list) for segment in self.segments)

    @property
    def ends_fused(self) -> bool:
        """Whether there are layers, of which the last is not called as a module."""
        return bool(self.segments) and isinstance(self.segments[-1], list)

    def run(self, input: Tensor, *, ours: bool = False, hold: int = 0) -> Tensor:
        """The concatenated features, or what the tail makes of them.

        `ours` says that nobody else has the input, to write to it before the backward. `hold`
        counts bottlenecks that are held besides the step's own.
        """
        segments = list(self.segments)
        last = _NOTHING
        if segments and isinstance(segments[-1], list):
            last = segments[-1]
            segments.pop()
        features, views = [input], False
        for segment in segments:
            if isinstance(segment, list):
                whole = self._fused(features, segment, None, None, ours, hold)
                widths = [part.shape[1] for part in features]
                widths += [weight_shape(layer.conv2)[0] for layer in segment]
                features = list(whole.split(widths, 1)) if self.lists else [whole]
                ours, views = True, self.lists
                continue
            if not leaves_input(segment):
                # Autograd lets nobody write to one of several views.
                copied = torch.clone if views else released
                features = [copied(part, memory_format=self.memory_format) for part in features]
                views = False
            added = segment(features) if self.lists else segment(*features)
            features = [*features, added] if self.lists else [added]
            ours = False
        if last or self.tail is not None:
            return self._fused(features, last, self.tail, self.order, ours, hold)
        return _joined(features)

    def _fused(
        self,
        features: list[Tensor],
        run: FusedRun,
        tail: TailParts | None,
        order: Sequence[int] | None,
        ours: bool,
        hold: int,
    ) -> Tensor:
        input = _joined(features)
        if self.checkpoint == "block" and not ours and input is features[0]:
            if torch.is_grad_enabled():
                input = input.clone()  # which the backward reads
        flat, reorder = self._flat(input.shape[1], run, tail)
        output = fused(input, flat, self.checkpoint, self.hold + hold)
        if reorder is not None:
            reorder.give_back()
        if tail is not None and tail.conv is not None:
            bias = parameter(tail.conv.__dict__, "bias")
            if bias is not None:  # behind the average as in front of it
                output = output + bias.to(output.dtype).view(-1, *[1] * (output.dim() - 2))
        if tail is not None and tail.kept:
            return output.view(*output.shape, *[1] * (input.dim() - 2))
        if order is None:
            return output
        pieces = output.split(_widths(input.shape[1], run), 1)
        return torch.cat([pieces[place] for place in order], 1)

    def _flat(
        self, channels: int, run: FusedRun, tail: TailParts | None
    ) -> tuple[FlatBlock, Reordering | None]:
        """The specs of a run; made once, as the step is only kept while its modules stay the same.

        But for averages over all steps, as the weight of a step in these changes, for layers that
        read the features in an order of their own, from copies of their parameters, and for biases
        in front of a norm, which is another one for each of their values.
        """
        found = self._specs.get(id(run))
        if found is not None:
            return found, None
        counted: list[Tensor] = []
        reorder = Reordering(_widths(channels, run))
        layers = [reorder.layer(layer_spec(layer, counted), layer.order) for layer in run]
        momenta = [getattr(norm, "momentum", 0.0) for layer in run for norm in layer.norms]
        behind: Tail | None = None
        if tail is not None:
            momenta.append(getattr(tail.norm, "momentum", 0.0))
            norm = norm_spec(tail.norm, counted)
            if tail.conv is None:
                behind = AvgPoolTail(norm)
            else:
                weight = parameter(tail.conv.__dict__, "weight")
                behind = TransitionTail(norm, weight, tail.linear)
                behind = reorder.transition(behind, tail.order)
        flat = FlatBlock(layers, behind)
        biased = any(layer.norm2.offset is not None for layer in layers)
        if reorder.unused and None not in momenta and not biased:
            self._specs[id(run)] = flat
        return flat, reorder


Step = ModuleStep | ConvStep | StemStep | MaxTransitionStep | DenseStep


def _joined(features: list[Tensor]) -> Tensor:
    return features[0] if len(features) == 1 else torch.cat(features, 1)


def _widths(channels: int, run: FusedRun) -> list[int]:
    """Channels of a run's input and of what every layer adds."""
    return [channels, *(weight_shape(layer.conv2)[0] for layer in run)]


def layer_spec(layer: LayerParts, counted: list[Tensor]) -> LayerSpec:
    """What the layer would do if it were called now; `counted` as of `norm_spec`."""
    norm1, conv1 = layer.norm1, layer.conv1
    weight = bias = None
    if conv1 is not None:
        weight, bias = parameter(conv1.__dict__, "weight"), parameter(conv1.__dict__, "bias")
    return LayerSpec(
        norm1=NO_NORM if norm1 is None else norm_spec(norm1, counted),
        conv1_weight=weight,
        norm2=norms.behind_bias(norm_spec(layer.norm2, counted), bias),
        conv2_weight=parameter(layer.conv2.__dict__, "weight"),
        dropout=layer.dropout,
        whole_channels=layer.whole_channels,
        conv2_bias=parameter(layer.conv2.__dict__, "bias"),
    )
