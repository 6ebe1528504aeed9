"""The stem's norm, ReLU and 3x3 max-pool of stride 2 as one autograd node."""

from __future__ import annotations

from torch import Tensor

from densenet_fast.specs import NormSpec


def stem_norm_relu_maxpool(input: Tensor, norm: NormSpec) -> Tensor:
    """max_pool2d(relu(norm(input)), kernel 3, stride 2, padding 1) of `[N, C, H, W]`.

    Keeps `input` and one byte per output element for the backward.
    """
    raise NotImplementedError
