"""What a dense block is made of, as plain data: the border between modules and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Checkpoint = Literal["none", "bottleneck", "block"]
CHECKPOINT_MODES: tuple[Checkpoint, ...] = ("none", "bottleneck", "block")


@dataclass(frozen=True)
class NormSpec:
    """One batch normalisation, as this step applies it.

    `batch_statistics=False` is a frozen norm: it normalises with `running_mean` and `running_var`,
    which must then be given. `momentum` is the weight of this step in the running statistics;
    None leaves them alone. BatchNorm's own `momentum=None` (a cumulative average) must be turned
    into a number by the caller, who also counts `num_batches_tracked`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float
    batch_statistics: bool
    momentum: float | None


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
