"""Real images that need no download: scikit-learn's handwritten digits, upscaled."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.datasets import Images

TEST_IMAGES = 360  # of 1,797: a fifth


def load(size: int = 32, seed: int = 0) -> Images:
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
    return Images(images[train], labels[train], images[test], labels[test])
