"""Real images that need no download: scikit-learn's handwritten digits, upscaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TEST_IMAGES = 360  # of 1,797: a fifth


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, size, size], normalised by the training images, and labels 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(size: int = 32, seed: int = 0) -> Digits:
    """The digits, bilinearly upscaled from 8×8, split at random by `seed`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return Digits(images[train], labels[train], images[test], labels[test])


def batches(digits: Digits, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """`steps` whole training batches, epoch after epoch, each epoch shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(digits.train_images), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield digits.train_images[chosen], digits.train_labels[chosen]
