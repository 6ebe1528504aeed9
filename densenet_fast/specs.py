"""What a dense block is made of, as plain data: the border between modules and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Checkpoint = Literal["none", "bottleneck", "block"]
CHECKPOINT_MODES: tuple[Checkpoint, ...] = ("none", "bottleneck", "block")
# A whole network may also choose for each of its blocks, by a memory budget.
NetworkMode = Checkpoint | Literal["auto"]
NETWORK_MODES: tuple[NetworkMode, ...] = (*CHECKPOINT_MODES, "auto")


@dataclass(frozen=True)
class NormSpec:
    """One batch normalisation, as this step applies it.

    `batch_statistics=False` is a frozen norm: it normalises with `running_mean` and `running_var`,
    which must then be given. `momentum` is the weight of this step in the running statistics;
    None leaves them alone. BatchNorm's own `momentum=None` (a cumulative average) must be turned
    into a number by the caller. `counter` is `num_batches_tracked`, where the step counts there.
    The batch's statistics are those of all ranks of `group`; None: of this process's batch alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_statistics: bool
    momentum: float | None
    group: ProcessGroup | None = None
    counter: Tensor | None = None


@dataclass(frozen=True)
class ConvGeometry:
    """What a convolution with zero padding is besides its weight and bias."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class LayerSpec:
    """norm1, ReLU, 1x1 convolution `[B, C_l, 1, 1]`, norm2, ReLU, 3x3 convolution `[k, B, 3, 3]`.

    `dropout` is the probability of zeroing an element of the layer's output; 0 in evaluation.
    """

    norm1: NormSpec
    conv1_weight: Tensor
    norm2: NormSpec
    conv2_weight: Tensor
    dropout: float = 0.0


@dataclass(frozen=True)
class TransitionTail:
    """norm, ReLU, 1x1 convolution `[Cout, C, 1, 1]`, 2x2 average pooling behind the block."""

    norm: NormSpec
    conv_weight: Tensor


@dataclass(frozen=True)
class AvgPoolTail:
    """norm, ReLU and the average over all pixels behind the block."""

    norm: NormSpec


Tail = TransitionTail | AvgPoolTail


# The tensors of a spec, in a fixed order, and the spec without them. Autograd must be handed the
# tensors to save; what an autograd node remembers besides should hold none.

Tensors = Sequence[Tensor | None]


def layer_parameters(layer: LayerSpec) -> list[Tensor | None]:
    """Norm1's weight and bias, conv1's weight, norm2's weight and bias, conv2's weight."""
    norm1, norm2 = layer.norm1, layer.norm2
    return [
        norm1.weight,
        norm1.bias,
        layer.conv1_weight,
        norm2.weight,
        norm2.bias,
        layer.conv2_weight,
    ]


def norm_buffers(norm: NormSpec) -> list[Tensor | None]:
    """The running statistics, where the norm computes with them."""
    return [None, None] if norm.batch_statistics else [norm.running_mean, norm.running_var]


def layer_buffers(layer: LayerSpec) -> list[Tensor | None]:
    """The running statistics that the layer computes with."""
    return norm_buffers(layer.norm1) + norm_buffers(layer.norm2)


def tail_parameters(tail: Tail | None) -> list[Tensor | None]:
    """The tail's norm's weight and bias, and a transition's weight."""
    if tail is None:
        return []
    affine = [tail.norm.weight, tail.norm.bias]
    return [*affine, tail.conv_weight] if isinstance(tail, TransitionTail) else affine


def tail_buffers(tail: Tail | None) -> list[Tensor | None]:
    """The running statistics that the tail computes with."""
    return [] if tail is None else norm_buffers(tail.norm)


def with_norm_tensors(norm: NormSpec, affine: Tensors, buffers: Tensors) -> NormSpec:
    """The norm with these tensors. It updates no running statistics."""
    weight, bias = affine
    running_mean, running_var = buffers
    return NormSpec(
        weight,
        bias,
        running_mean,
        running_var,
        norm.eps,
        norm.batch_statistics,
        momentum=None,
        group=norm.group,
    )


def with_layer_tensors(layer: LayerSpec, parameters: Tensors, buffers: Tensors) -> LayerSpec:
    """The layer with these tensors, in the order of `layer_parameters` and `layer_buffers`."""
    return LayerSpec(
        with_norm_tensors(layer.norm1, parameters[:2], buffers[:2]),
        cast(Tensor, parameters[2]),
        with_norm_tensors(layer.norm2, parameters[3:5], buffers[2:]),
        cast(Tensor, parameters[5]),
        layer.dropout,
    )


def with_tail_tensors(tail: Tail | None, parameters: Tensors, buffers: Tensors) -> Tail | None:
    """The tail with these tensors."""
    if tail is None:
        return None
    norm = with_norm_tensors(tail.norm, parameters[:2], buffers)
    if isinstance(tail, TransitionTail):
        return TransitionTail(norm, cast(Tensor, parameters[2]))
    return AvgPoolTail(norm)


_NOTHING: Tensors = (None,) * 6


def without_layer_tensors(layer: LayerSpec) -> LayerSpec:
    """The layer's numbers alone."""
    return with_layer_tensors(layer, _NOTHING, _NOTHING[:4])


def without_tail_tensors(tail: Tail | None) -> Tail | None:
    """The tail's numbers alone."""
    return with_tail_tensors(tail, _NOTHING[:3], _NOTHING[:2])
