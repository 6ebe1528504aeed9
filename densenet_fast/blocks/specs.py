"""What a dense block is made of, as plain data: the border between modules and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Checkpoint = Literal["none", "bottleneck", "block"]
CHECKPOINT_MODES: tuple[Checkpoint, ...] = ("none", "bottleneck", "block")
# A whole network may also choose for each of its blocks, by a memory budget.
NetworkMode = Checkpoint | Literal["auto"]
NETWORK_MODES: tuple[NetworkMode, ...] = (*CHECKPOINT_MODES, "auto")


# By the number of an image's dimensions.
SHAPES = {1: "[N, C, L]", 2: "[N, C, H, W]", 3: "[N, C, D, H, W]"}


class NormSpec(NamedTuple):
    """One batch normalisation, as this step applies it.

    `batch_statistics=False` is a frozen norm: it normalises with `running_mean` and `running_var`,
    which must then be given. `momentum` is the weight of this step in the running statistics;
    None leaves them alone. BatchNorm's own `momentum=None` (a cumulative average) must be turned
    into a number by the caller. `counter` is `num_batches_tracked`, where the step counts there.
    The batch's statistics are those of all ranks of the process group of the name `group`; "": of
    this process's batch alone. `offset` [C], if there is one, is in the mean that `running_mean`
    follows, but not in what is normalised.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_statistics: bool
    momentum: float | None
    group: str = ""
    counter: Tensor | None = None
    offset: Tensor | None = None


class ConvGeometry(NamedTuple):
    """What a convolution with zero padding is besides its weight and bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


# Stands for the norm of what is not there.
NO_NORM = NormSpec(None, None, None, None, 0.0, True, None)


class LayerSpec(NamedTuple):
    """norm1, ReLU, 1x1 convolution `[B, C_l, 1, 1]`, norm2, ReLU, 3x3 convolution `[k, B, 3, 3]`.

    Weights of one dimension are `[B, C_l, 1]` and `[k, B, 3]`, those of three have one size more.
    Without a bottleneck there are norm2, over the `C_l` features, ReLU and `[k, C_l, 3, 3]` alone:
    norm1 is `NO_NORM`, the 1x1 convolution's weight None.
    `dropout` is the probability of zeroing an element of the layer's output, or with
    `whole_channels` a whole channel of an image; 0 in evaluation. The output has `conv2_bias` `[k]`
    in it, if there is one.
    """

    norm1: NormSpec
    conv1_weight: Tensor | None
    norm2: NormSpec
    conv2_weight: Tensor
    dropout: float = 0.0
    whole_channels: bool = False
    conv2_bias: Tensor | None = None

    @property
    def of_features(self) -> NormSpec:
        """The norm over the features that the layer reads."""
        return self.norm2 if self.conv1_weight is None else self.norm1


class TransitionTail(NamedTuple):
    """norm, ReLU, 1x1 convolution `[Cout, C, 1, 1]`, 2x2 average pooling behind the block.

    In one and three dimensions one size less or more. A `linear` one has no ReLU.
    """

    norm: NormSpec
    conv_weight: Tensor
    linear: bool = False


class MaxTransition(NamedTuple):
    """norm, ReLU, 1x1 convolution `[Cout, C, 1, 1]` with its bias, dropout, 2x2 maximum.

    `dropout` and `whole_channels` are those of a layer.
    """

    norm: NormSpec
    conv_weight: Tensor
    conv_bias: Tensor | None = None
    dropout: float = 0.0
    whole_channels: bool = False


class AvgPoolTail(NamedTuple):
    """norm, ReLU and the average over all pixels behind the block."""

    norm: NormSpec


Tail = TransitionTail | AvgPoolTail
Tensors = Sequence[Tensor | None]


class Settings(NamedTuple):
    """A block without its tensors: what a graph holds of it, and an autograd node remembers.

    Of every norm (norm1 and norm2 of each layer, then the tail's) eps, whether it takes the batch's
    statistics, and the name of its process group (no names at all if none is synchronised).
    """

    eps: Sequence[float]
    batch_statistics: Sequence[bool]
    groups: Sequence[str]
    dropout: Sequence[float]
    whole_channels: Sequence[bool]
    tail: str  # "none", "transition" or "average"
    linear: bool  # of a transition: it has no ReLU
    checkpoint: Checkpoint = "bottleneck"
    hold: int = 0  # last layers whose bottleneck is held for the backward


def block_norms(layers: Sequence[LayerSpec], tail: Tail | None) -> list[NormSpec]:
    """Norm1 and norm2 of every layer, and the tail's."""
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
    return norms if tail is None else [*norms, tail.norm]


def flattened(
    layers: Sequence[LayerSpec], tail: Tail | None
) -> tuple[list[Tensor | None], list[Tensor | None], Settings]:
    """A block's parameters, the running statistics that it computes with, and the rest.

    The parameters are six for each layer (norm1's weight and bias, conv1's weight, norm2's weight
    and bias, conv2's weight), conv2's bias of every layer, and the tail's norm's weight and bias
    and a transition's weight. Of the statistics there are two for each norm, None where it takes
    the batch's.
    """
    parameters: list[Tensor | None] = []
    for norm1, conv1, norm2, conv2, *_ in layers:
        parameters += (norm1.weight, norm1.bias, conv1, norm2.weight, norm2.bias, conv2)
    parameters += (layer.conv2_bias for layer in layers)
    kind = "none"
    if tail is not None:
        parameters += (tail.norm.weight, tail.norm.bias)
        kind = "average"
    if isinstance(tail, TransitionTail):
        parameters.append(tail.conv_weight)
        kind = "transition"
    norms = block_norms(layers, tail)
    buffers: list[Tensor | None] = []
    for norm in norms:
        buffers += (None, None) if norm.batch_statistics else (norm.running_mean, norm.running_var)
    groups = [norm.group for norm in norms]
    return (
        parameters,
        buffers,
        Settings(
            [norm.eps for norm in norms],
            [norm.batch_statistics for norm in norms],
            groups if any(groups) else [],
            [layer.dropout for layer in layers],
            [layer.whole_channels for layer in layers],
            kind,
            isinstance(tail, TransitionTail) and tail.linear,
        ),
    )
