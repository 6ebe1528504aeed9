"""Images to train on, whichever data set they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from densenet_fast.train.errors import DataError

__all__ = ["DataError", "Images", "batches"]


@dataclass(frozen=True)
class Images:
    """Images [N, 1, size, size], normalised by the training images, and labels 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def batches(images: Images, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """`steps` whole training batches, epoch after epoch, each epoch shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images.train_images), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield images.train_images[chosen], images.train_labels[chosen]
