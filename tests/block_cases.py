"""Blocks to test: their parameters, made from a seed, and a comparison with the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from devices import device
from torch import Tensor

from densenet_fast.blocks.specs import (
    NO_NORM,
    AvgPoolTail,
    LayerSpec,
    NormSpec,
    Tail,
    TransitionTail,
    flattened,
)

TAILS = (None, "transition", "linear", "avgpool")


@dataclass
class Block:
    """An input and a block on it."""

    input: Tensor
    layers: list[LayerSpec]
    tail: Tail | None

    def parameters(self) -> list[Tensor]:
        every, _, _ = flattened(self.layers, self.tail)
        return [tensor for tensor in every if tensor is not None]

    def norms(self) -> list[NormSpec]:
        norms = [norm for layer in self.layers for norm in (layer.norm1, layer.norm2)]
        return norms + ([self.tail.norm] if self.tail is not None else [])

    def buffers(self) -> list[Tensor]:
        """Running statistics, by value."""
        both = [(norm.running_mean, norm.running_var) for norm in self.norms()]
        return [tensor.clone() for pair in both for tensor in pair if tensor is not None]

    def leaves(self) -> list[Tensor]:
        """What requires a gradient."""
        return [tensor for tensor in [self.input, *self.parameters()] if tensor.requires_grad]

    def copy(self, dtype: torch.dtype | None = None) -> Block:
        """The same numbers in other tensors, which require the same gradients."""

        def tensor(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            copied = value.detach().to(dtype or value.dtype, copy=True)
            return copied.requires_grad_(value.requires_grad)

        def norm(value: NormSpec) -> NormSpec:
            return value._replace(
                weight=tensor(value.weight),
                bias=tensor(value.bias),
                running_mean=tensor(value.running_mean),
                running_var=tensor(value.running_var),
            )

        layers = [
            layer._replace(
                norm1=norm(layer.norm1),
                norm2=norm(layer.norm2),
                conv1_weight=tensor(layer.conv1_weight),
                conv2_weight=tensor(layer.conv2_weight),
                conv2_bias=tensor(layer.conv2_bias),
            )
            for layer in self.layers
        ]
        tail = None if self.tail is None else self.tail._replace(norm=norm(self.tail.norm))
        if isinstance(tail, TransitionTail):
            tail = tail._replace(conv_weight=tensor(tail.conv_weight))
        return Block(tensor(self.input), layers, tail)


def make_norm(
    channels: int,
    generator: torch.Generator,
    *,
    frozen: bool = False,
    affine: bool = True,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    dtype: torch.dtype = torch.float64,
) -> NormSpec:
    def vector(low: float, high: float) -> Tensor:
        values = torch.rand(channels, generator=generator, dtype=dtype) * (high - low) + low
        return values.to(device())

    return NormSpec(
        weight=vector(0.5, 1.5).requires_grad_() if affine else None,
        bias=vector(-0.5, 0.5).requires_grad_() if affine else None,
        running_mean=vector(-0.5, 0.5),
        running_var=vector(0.5, 2),
        eps=eps,
        batch_statistics=not frozen,
        momentum=momentum,
    )


def make_block(
    shape: tuple[int, ...] = (2, 5, 6, 7),
    growths: Sequence[int] = (3, 3, 4),
    tail: str | None = None,
    *,
    width: int | Sequence[int] = 8,
    frozen: Sequence[int] = (),
    biased: Sequence[int] = (),
    affine: bool = True,
    eps: Sequence[float] = (1e-5,),
    dropout: float = 0.0,
    whole_channels: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Block:
    """A block on `shape`; `frozen` numbers norms in order, `biased` layers.

    A layer of width 0 has no bottleneck.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 0

    def norm(channels: int) -> NormSpec:
        nonlocal count
        spec = make_norm(
            channels,
            generator,
            frozen=count in frozen,
            affine=affine,
            eps=eps[count % len(eps)],
            dtype=dtype,
        )
        count += 1
        return spec

    def weight(*size: int) -> Tensor:
        fan_in = math.prod(size[1:])
        values = torch.randn(size, generator=generator, dtype=dtype) * (2 / fan_in) ** 0.5
        return values.to(device()).requires_grad_()

    channels, one, three = shape[1], [1] * (len(shape) - 2), [3] * (len(shape) - 2)
    layers = []
    widths = [width] * len(growths) if isinstance(width, int) else width
    for at, (growth, own) in enumerate(zip(growths, widths, strict=True)):
        first = (norm(channels), weight(own, channels, *one)) if own else (NO_NORM, None)
        read = own or channels
        second = (norm(read), weight(growth, read, *three))
        bias = weight(growth) if at in biased else None
        layers.append(LayerSpec(*first, *second, dropout, whole_channels, bias))
        channels += growth
    behind: Tail | None = None
    if tail in ("transition", "linear"):
        of_conv = weight((channels + 1) // 2, channels, *one)
        behind = TransitionTail(norm(channels), of_conv, tail == "linear")
    elif tail == "avgpool":
        behind = AvgPoolTail(norm(channels))
    input = torch.randn(shape, generator=generator, dtype=dtype).to(device())
    return Block(input.requires_grad_(), layers, behind)


def gradients(output: Tensor, leaves: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a random weighted sum of the output."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return list(torch.autograd.grad(output, leaves, factors.to(output)))
