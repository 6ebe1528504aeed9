"""Images with labels, by name or from a folder: what there is and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from densenet_fast.train.entries import MULTICLASS
from densenet_fast.train.errors import DataError, UsageError, lack_of_memory

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DIGITS = "digits"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_TEST = 5  # every fifth of scikit-learn's digits is for validation


class Samples(Protocol):
    """Images, each a PIL image or an unsigned byte tensor [C, H, W], with labels."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        """One image and its label or labels."""


@dataclass(frozen=True)
class Source:
    """A data set as training needs it.

    `mean` and `std` are of values from 0 to 1, per channel. `size` is the images' own, where all
    have the same; None for photographs of any size, which are cut to ImageNet's usual sizes.
    `flip` tells whether a mirrored image is still of its class. Of task "multilabel", `classes` are
    the labels, of which each image has 1, 0, or nan where nothing is known.
    """

    name: str
    train: Samples
    val: Samples
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None
    flip: bool
    task: str = MULTICLASS
    skipped: int = 0  # images left out because they are corrupt
    left_out: int = 0  # entries of folders that are hidden or no regular files
    note: str = ""  # what else there is to say

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)


class ArraySamples:
    """Images [N, H, W] of unsigned bytes, of one channel."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """How many."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One image [1, H, W] and its label."""
        import torch
        from torchvision.tv_tensors import Image

        return Image(torch.from_numpy(self.images[index])[None]), int(self.labels[index])


def _of_arrays(
    name: str,
    train: tuple[npt.NDArray[np.uint8], Sequence[int]],
    val: tuple[npt.NDArray[np.uint8], Sequence[int]],
    classes: Sequence[str],
    flip: bool,
) -> Source:
    images = train[0]
    mean, std = float(images.mean()) / 255, float(images.std()) / 255
    if not std > 0:
        raise DataError(f"{name}: expected images, found one value in all pixels")
    return Source(
        name=name,
        train=ArraySamples(*train),
        val=ArraySamples(*val),
        classes=tuple(classes),
        mean=(mean,),
        std=(std,),
        size=images.shape[1],
        flip=flip,
    )


def _digits(folder: Path | None, download: bool) -> Source:
    from densenet_fast.train.requirements import require

    require(("sklearn",), f"--data {DIGITS}")
    import numpy as np
    from sklearn.datasets import load_digits

    if folder is not None or download:
        given = "--download" if folder is None else f"--data-path {folder}"
        raise UsageError(f"{given} does not apply to --data {DIGITS}, which come with scikit-learn")
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # values are 0 to 16
    labels = data.target.tolist()
    chosen = np.arange(len(images)) % DIGITS_TEST == 0
    parts = [
        (images[part], [label for label, inside in zip(labels, part, strict=True) if inside])
        for part in (~chosen, chosen)
    ]
    return _of_arrays(DIGITS, parts[0], parts[1], [str(n) for n in range(10)], flip=False)


def _fashion_mnist(folder: Path | None, download: bool) -> Source:
    from torchvision.datasets import FashionMNIST

    from densenet_fast.train import idx

    if download:
        raise UsageError(
            "--download does not apply to --data fashion-mnist, the files of a folder or of the "
            f"Debian package {idx.PACKAGE}: --data fashionmnist is torchvision's, which it fetches"
        )
    return replace(
        _idx("fashion-mnist", folder or idx.FOLDER),
        classes=tuple(FashionMNIST.classes),
        flip=True,
    )


def _idx(name: str, folder: Path) -> Source:
    from densenet_fast.train import idx

    (train, train_labels), (val, val_labels) = (
        idx.read_pair(folder, names) for names in (idx.TRAIN, idx.TEST)
    )
    classes = [str(n) for n in range(idx.CLASSES)]
    parts = (train, train_labels.tolist()), (val, val_labels.tolist())
    return _of_arrays(name, *parts, classes, flip=False)


def _torchvision(
    name: str, kind: str, mean: tuple[float, ...], std: tuple[float, ...], size: int, flip: bool
) -> Callable[[Path | None, bool], Source]:
    def load(folder: Path | None, download: bool) -> Source:
        from torchvision import datasets

        root = folder or Path("data")
        make = getattr(datasets, kind)
        try:
            train, val = (make(root, train=part, download=download) for part in (True, False))
        except (OSError, RuntimeError) as error:
            if lack_of_memory(error):
                raise
            how = "" if download else "; --download fetches it"
            raise DataError(f"--data {name} in {root}: {error}{how}") from error
        return Source(name, train, val, tuple(train.classes), mean, std, size, flip)

    return load


# Means and deviations of the training images.
SOURCES: dict[str, Callable[[Path | None, bool], Source]] = {
    DIGITS: _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _torchvision(
        "cifar10", "CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32, True
    ),
    "cifar100": _torchvision(
        "cifar100", "CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 32, True
    ),
    "fashionmnist": _torchvision("fashionmnist", "FashionMNIST", (0.2860,), (0.3530,), 28, True),
    "mnist": _torchvision("mnist", "MNIST", (0.1307,), (0.3081,), 28, False),
}


def open_source(data: str | None, folder: Path | None, *, download: bool) -> Source | Path:
    """The data set of that name, or the folder of images that `data` or `folder` is.

    Raises:
        UsageError: there is no data set of that name, or its files are not there or wrong.
    """
    if data is None and folder is None:
        data = DIGITS
    if data is not None and data in SOURCES:
        return SOURCES[data](folder, download)
    if data is not None and folder is not None:
        raise UsageError(
            f"--data {data!r} is no data set to look for in --data-path {folder}: there are "
            f"{', '.join(SOURCES)}"
        )
    folder = Path(data) if folder is None and data is not None else folder
    assert folder is not None
    if not folder.is_dir():
        raise UsageError(
            f"unknown data {str(folder)!r}: no such folder, and not one of {', '.join(SOURCES)}"
        )
    if download:
        raise UsageError(f"--download does not apply to the folder {folder}")
    from densenet_fast.train import idx

    return _idx(str(folder), folder) if idx.is_folder(folder) else folder
