"""Fashion-MNIST, or other images in the same IDX files, from a folder: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.datasets import DataError, Images
from densenet_fast.train.idx import FOLDER, TEST, TRAIN, Bytes, read_idx, read_pair

__all__ = ["FOLDER", "TEST", "TRAIN", "load", "read_idx"]

PADDING = 2  # on each side: DenseNet-BC halves twice, and 32×32 is its usual input


def load(folder: Path = FOLDER) -> Images:
    """The images of a folder, padded to 32×32 by background."""
    train, train_labels = read_pair(folder, TRAIN)
    test, test_labels = read_pair(folder, TEST)
    train_images, test_images = _pad(train), _pad(test)
    std, mean = torch.std_mean(train_images)
    if not std > 0:
        raise DataError(f"{folder / TRAIN[0]}: expected images, found one value in all pixels")
    for images in (train_images, test_images):
        images.sub_(mean).div_(std)
    return Images(train_images, _to_labels(train_labels), test_images, _to_labels(test_labels))


def _pad(images: Bytes) -> Tensor:
    return nn.functional.pad(torch.from_numpy(images)[:, None], (PADDING,) * 4).float()


def _to_labels(labels: Bytes) -> Tensor:
    return torch.from_numpy(labels).to(torch.int64)
