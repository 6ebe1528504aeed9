"""What a network is built from, as the command line and checkpoints say it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import densenet_fast
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train.errors import TrainingError, UsageError

BC = "densenet-bc"  # for small images
IMAGENET_MODELS = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264")
MODELS = (*IMAGENET_MODELS, BC)
IMAGENET_CLASSES = 1000
MOST_LAYERS = MOST_GROWTH = 10_000  # of a DenseNet-BC: sizes of larger ones leave 64 bits


@dataclass(frozen=True)
class Architecture:
    """What a network is built from; plain data, as checkpoints hold it."""

    model: str
    num_classes: int
    in_channels: int
    drop_rate: float = 0.0
    depth: int | None = None  # of a DenseNet-BC
    growth_rate: int | None = None

    def build(self) -> EfficientDenseNet:
        """The network, with parameters drawn from PyTorch's generator.

        Raises:
            UsageError: there is no DenseNet-BC of this depth.
            TrainingError: this machine has less memory than the parameters take.
        """
        needed = sum(tensor.nbytes for tensor in self.skeleton().state_dict().values())
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise TrainingError(
                f"{self}: parameters take {needed / 2**20:,.0f} MiB, this machine has "
                f"{there / 2**20:,.0f} MiB of memory"
            )
        return self._make()

    def skeleton(self) -> EfficientDenseNet:
        """The network without values, on PyTorch's device "meta".

        Raises:
            UsageError: there is no DenseNet-BC of this depth.
        """
        with torch.device("meta"):
            return self._make()

    def _make(self) -> EfficientDenseNet:
        common: dict[str, Any] = {
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
            "drop_rate": self.drop_rate,
        }
        if self.model != BC:
            builder: Callable[..., EfficientDenseNet] = getattr(densenet_fast, self.model)
            return builder(**common)
        assert self.depth is not None and self.growth_rate is not None
        layers, rest = divmod(self.depth - 4, 6)
        if rest or layers < 1:
            raise UsageError(
                f"--depth must be 6n + 4 (three blocks of n layers): 10, 16, 22, ..., 40, 100; "
                f"got {self.depth}"
            )
        return EfficientDenseNet(
            self.growth_rate, (layers,) * 3, 2 * self.growth_rate, small_inputs=True, **common
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        size = "" if self.depth is None else f" (depth {self.depth}, k = {self.growth_rate})"
        return f"{self.model}{size}, {self.num_classes} classes, {self.in_channels} channels"
