"""A network for evaluation alone: nothing is planned, checked or packed at a call.

`optimize_for_inference` copies a network. Its blocks run with weights packed once for their kernels
and norms turned into coefficients once, each writing into the feature buffer of the next. What a
network does besides (modules of unknown types, hooks, other devices than the CPU) runs as usual.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import operators
from densenet_fast.blocks import autocast, norms, stem_convolution
from densenet_fast.blocks.forward import halved
from densenet_fast.blocks.specs import NO_NORM, NormSpec
from densenet_fast.blocks.stem import pooled
from densenet_fast.conversion.parts import ConvertedNetwork
from densenet_fast.modules import eligibility
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.dimensions import MODULES, Conv
from densenet_fast.modules.layer_parts import LayerParts, TailParts
from densenet_fast.modules.steps import (
    ConvStep,
    DenseStep,
    StemStep,
    Step,
    layer_spec,
    norm_spec,
)
from densenet_fast.operators import extension, winograd
from densenet_fast.operators.backends import select
from densenet_fast.operators.rows import (
    as_rows,
    empty_channels_last,
    row_pitch,
    rows_of,
    statistics_dtype,
)

Room = Callable[[Sequence[int]], Tensor]  # of [N, *size]
_operators: Any = torch.ops.densenet_fast


class OptimizedNetwork(nn.Module):
    """What `optimize_for_inference` returns: a snapshot of `network`, for evaluation alone."""

    def __init__(self, network: nn.Module) -> None:
        """Keep a copy of `network`."""
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.network.zero_grad(set_to_none=True)
        self.training = False
        self._prepared: dict[Any, Prepared | None] = {}
        self._sizes: set[torch.Size] = set()  # of images that the network has accepted

    def __getstate__(self) -> dict[str, Any]:
        """Everything but packed weights, which are this machine's."""
        return {**self.__dict__, "_prepared": {}, "_sizes": set()}

    def _forget(self) -> None:
        self._prepared, self._sizes = {}, set()

    def train(self, mode: bool = True) -> OptimizedNetwork:
        """Refuse training mode; evaluation mode is the only one.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError(
                "a network made by optimize_for_inference is for evaluation alone: train the "
                "network that it was made from, and optimize that again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedNetwork:
        self._forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; weights are packed again."""
        self._forget()
        return super().load_state_dict(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """What the network gives for `images` [N, C, *size] in evaluation, without gradients.

        Raises:
            RuntimeError: `images` require a gradient.
        """
        if torch.is_grad_enabled() and isinstance(images, Tensor) and images.requires_grad:
            raise RuntimeError(
                "a network made by optimize_for_inference has no gradients, but its input requires "
                "one: use the network that it was made from, or images.detach()"
            )
        with torch.no_grad():
            prepared = self._for(images)
            output: Tensor = self.network(images) if prepared is None else prepared(images)
            return output

    def _for(self, images: Tensor) -> Prepared | None:
        """The network prepared for images of this kind; None: it runs as usual."""
        if (
            type(images) is not Tensor
            or images.dim() - 2 not in MODULES
            or not images.numel()
            or torch.compiler.is_compiling()
            or eligibility.surroundings() is not None
            or autocast.enabled(images.device.type)
            or select(images) != "cpu"
        ):
            return None
        # What packed weights and the choice of steps depend on, but for the images' size.
        isa = extension.C.isa_in_use() if extension.C is not None else ""
        key = (images.dtype, isa, winograd.winograd_enabled())
        if key not in self._prepared:
            self._prepared[key] = _prepared(self.network, images)
        if images.shape[1:] not in self._sizes:
            # Whatever is wrong with images of this size is said by the network.
            self.network(images)
            self._sizes.add(images.shape[1:])
        return self._prepared[key]


def optimize_for_inference(model: nn.Module) -> OptimizedNetwork:
    """A network that gives what `model` gives in evaluation, the same bits, in less time.

    It is a snapshot, with its own copy of the weights: later changes of `model`, its weights or
    hooks, do not reach it. Besides that copy it keeps the weights packed for the kernels (3x3
    convolutions in one or two forms, by the images' size). It may be called by several threads and
    pickled. `EfficientDenseNet` and networks that `densenet_fast.convert` has converted run
    optimized on CPUs; anything else runs as it did. The first call with images of a new size takes
    longer.

    Args:
        model: any module that takes images [N, C, *size], in any mode.

    Raises:
        TypeError: `model` is not a module.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, OptimizedNetwork):
        model = model.network
    return OptimizedNetwork(model)


def _prepared(network: nn.Module, images: Tensor) -> Prepared | None:
    """A network of fused steps throughout, prepared for images as these."""
    kind: Any = type(network)
    if kind.forward is not EfficientDenseNet.forward and (
        not isinstance(network, ConvertedNetwork) or kind.run is not ConvertedNetwork.run
    ):
        return None
    if eligibility.touched(network) is not None:
        return None
    known: Any = network
    planned = known.inference_steps(images)
    if planned is None:
        return None
    steps, head = planned
    stages: list[Stem | Block] = []
    for step in steps:
        stage = _stage(step, stages, images)
        if stage is None:
            return None
        stages = stage
    if not stages or not isinstance(stages[-1], Block) or stages[-1].conv is not None:
        return None
    return Prepared(stages, head)


def _stage(step: Step, before: list[Any], images: Tensor) -> list[Any] | None:
    """The stages with this step behind them; None: it cannot be prepared."""
    if isinstance(step, ConvStep) and eligibility.zero_padded(step.module) and not before:
        return [Stem(step.module, None)]
    if isinstance(step, StemStep):
        if step.conv is not None and not before:
            return [Stem(step.conv, step.norm)]
        if step.conv is None and len(before) == 1 and isinstance(before[0], Stem):
            return [Stem(before[0].conv, step.norm)]
        return None
    if isinstance(step, DenseStep) and len(step.segments) == 1 and before:
        segment = step.segments[0]
        if isinstance(segment, list) and step.tail is not None and _packable(segment, step.tail):
            return [*before, Block(segment, step.tail, images)]
    return None


def _packable(layers: Sequence[LayerParts], tail: TailParts) -> bool:
    """Whether features are read in the order they are stored in, and no bias is added to any."""
    convolutions = [*(layer.conv2 for layer in layers), tail.conv]
    biased = any(conv is not None and conv.bias is not None for conv in convolutions)
    orders = [*(layer.order for layer in layers), tail.order]
    return not (biased or tail.kept) and orders == [None] * len(orders)


def _coefficients(norm: NormSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in evaluation, of images as `like`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    given = (norm.weight, norm.bias, norm.eps, norm.running_mean, norm.running_var)
    return norms.coefficients(*given, like)[:2]


class Stem:
    """The first convolution, and norm, ReLU and max-pooling behind it where there are any."""

    def __init__(self, conv: Conv, norm: Any) -> None:
        """Copy the convolution's weight in the layout that writes channels innermost."""
        self.conv = conv
        self.weight = stem_convolution.channels_innermost(conv.weight)
        self.norm = None
        if norm is not None:
            like = torch.empty(0, dtype=statistics_dtype(conv.weight.dtype))
            self.norm = _coefficients(norm_spec(norm, []), like)

    def __call__(self, images: Tensor, room: Room) -> None:
        """Write the features into what `room` gives for their [N, *size]."""
        features = stem_convolution.module_forward(self.conv, images, self.weight, self.conv.bias)
        rows = as_rows(features)
        if self.norm is None:
            room(rows.shape[:-1]).copy_(rows)
            return
        count, *size, _ = rows.shape
        out = room((count, *pooled(size)))
        argmax = torch.empty(out.shape, dtype=torch.uint8)
        operators.norm_relu_maxpool_forward(rows, *self.norm, out, argmax)


class Block:
    """A dense block and what is fused behind it, with packed weights and coefficients."""

    def __init__(self, layers: Sequence[LayerParts], tail: TailParts, images: Tensor) -> None:
        """Copy what the kernels read; images have the type of `images`."""
        self.dtype = images.dtype
        like = torch.empty(0, dtype=statistics_dtype(images.dtype))
        self.weights = [conv.weight for part in layers for conv in part.convolutions]
        growths = [(part.width, len(part.conv2.weight)) for part in layers]
        self.sizes = [self.weights[0].shape[1], *(size for both in growths for size in both)]
        self.channels = self.sizes[0] + sum(self.sizes[2::2])
        specs = [layer_spec(part, []) for part in layers]
        of_layers = [norm for spec in specs for norm in (spec.norm1, spec.norm2)]
        pairs = [_coefficients(norm, like) for norm in of_layers if norm is not NO_NORM]
        self.coefficients = torch.cat([vector for pair in pairs for vector in pair])
        self.widest = max(self.sizes[1::2])
        self.packed: dict[tuple[int, ...], Tensor] = {}  # by the images' size
        self.linear = tail.linear
        self.tail_norm = _coefficients(norm_spec(tail.norm, []), like)
        # None: the average.
        self.conv = None if tail.conv is None else tail.conv.weight.flatten(1)
        if self.conv is not None:
            self.tail_packed = _packed(images, [self.conv], [0] * (images.dim() - 2))

    def room(self, pixels: Sequence[int]) -> Tensor:
        """An empty feature buffer for `pixels` [N, *size] as rows [N, *size, C]."""
        pitch = row_pitch(self.channels, self.dtype.itemsize, cuda=False)
        like = torch.empty(0, dtype=self.dtype)
        count, *size = pixels
        return rows_of(empty_channels_last((count, self.channels, *size), like, pitch))

    def __call__(self, features: Tensor, room: Room) -> Tensor | None:
        """Fill the buffer, and write what the tail makes of it into what `room` gives."""
        count, *size, _ = features.shape
        packed = self.packed.get(tuple(size))
        if packed is None:
            packed = _packed(features, self.weights, size)
            # Sizes differ in how 3x3 convolutions are computed, and that shows in the length.
            same = [other for other in self.packed.values() if len(other) == len(packed)]
            packed = self.packed[tuple(size)] = same[0] if same else packed
        bottleneck = features.new_empty(count * math.prod(size) * self.widest)
        _operators.dense_block_inference_(
            features, bottleneck, self.coefficients, packed, self.sizes
        )
        if self.conv is None:
            out = features.new_empty(count, self.channels)
            operators.norm_relu_avgpool_forward(features, *self.tail_norm, out)
            return out
        out = room((count, *halved(size)))
        given = (features, *self.tail_norm, self.conv, out, None, None, self.linear)
        _operators.transition_forward(*given, self.tail_packed)
        return None


def _packed(like: Tensor, weights: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    packed: Tensor = _operators.packed_weights(like, weights, size)
    return packed


class Prepared:
    """Stages, each of which writes into the feature buffer of the next, and the head."""

    def __init__(self, stages: Sequence[Any], head: Callable[[Tensor], Tensor]) -> None:
        """Run `stages`, then `head` on their pooled features [N, C]."""
        self.stem, *self.blocks = stages
        self.head = head

    def __call__(self, images: Tensor) -> Tensor:
        """The network's output."""
        features: Tensor | None = None

        def room_of(block: Block) -> Room:
            def room(pixels: Sequence[int]) -> Tensor:
                nonlocal features
                features = block.room(pixels)
                return features[..., : block.sizes[0]]

            return room

        self.stem(images, room_of(self.blocks[0]))
        output = None
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            assert features is not None
            output = block(features, room_of(following or block))
        assert output is not None
        return self.head(output)
