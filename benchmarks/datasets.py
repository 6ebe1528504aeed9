"""Images to train on: scikit-learn's digits, which need no download, or IDX files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from densenet_fast.train import idx
from densenet_fast.train.errors import DataError

TRAIN_DIGITS, TEST_DIGITS = 1_437, 360
PADDING = 2  # of 28×28 on each side: DenseNet-BC halves twice, and 32×32 is its usual input


@dataclass(frozen=True)
class Images:
    """Images [N, 1, size, size], normalised by the training images, and labels 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(data: str, seed: int) -> Images:
    """The images that `--data` names: "digits", "fashion-mnist" or a folder."""
    if data == "digits":
        return digits(seed=seed)
    return fashion_mnist(idx.FOLDER if data == "fashion-mnist" else Path(data))


def digits(size: int = 32, seed: int = 0) -> Images:
    """Handwritten digits, bilinearly upscaled from 8×8, split at random by `seed`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_DIGITS], order[TEST_DIGITS:]
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return Images(images[train], labels[train], images[test], labels[test])


def fashion_mnist(folder: Path) -> Images:
    """The images of a folder of Fashion-MNIST's files, padded to 32×32 by background."""
    loaded: list[Tensor] = []
    for names in (idx.TRAIN, idx.TEST):
        pixels, labels = idx.read_pair(folder, names)
        padded = nn.functional.pad(torch.from_numpy(pixels)[:, None], (PADDING,) * 4).float()
        loaded += [padded, torch.from_numpy(labels).to(torch.int64)]
    std, mean = torch.std_mean(loaded[0])
    if not std > 0:
        raise DataError(f"{folder / idx.TRAIN[0]}: expected images, found one value in all pixels")
    for images in loaded[::2]:
        images.sub_(mean).div_(std)
    return Images(*loaded)


def batches(images: Images, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """`steps` whole training batches, epoch after epoch, each epoch shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(images.train_images), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        yield images.train_images[chosen], images.train_labels[chosen]
