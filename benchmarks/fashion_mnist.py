"""Fashion-MNIST, or other images in the same IDX files, from a folder: nothing is downloaded."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.datasets import DataError, Images

PACKAGE = "dataset-fashion-mnist"  # of Debian and Ubuntu
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts the files
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

SIZE = 28  # pixels, height and width
CLASSES = 10
PADDING = 2  # on each side: DenseNet-BC halves twice, and 32×32 is its usual input
UNSIGNED_BYTES = 0x08  # type of the elements in an IDX file's magic number

Bytes = npt.NDArray[np.uint8]


def load(folder: Path = FOLDER) -> Images:
    """The images of a folder, padded to 32×32 by background."""
    train, train_labels = _read_pair(folder, TRAIN)
    test, test_labels = _read_pair(folder, TEST)
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


def _read_pair(folder: Path, names: tuple[str, str]) -> tuple[Bytes, Bytes]:
    """Images and their labels, which must fit each other."""
    image_path, label_path = (_find(folder, name) for name in names)
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if images.shape[1:] != (SIZE, SIZE) or not len(images):
        found = "×".join(map(str, images.shape))
        raise DataError(f"{image_path}: expected N×{SIZE}×{SIZE} pixels, found {found}")
    if len(labels) != len(images):
        raise DataError(
            f"{label_path}: expected {len(images)} labels, one for each image of "
            f"{image_path.name}, found {len(labels)}"
        )
    if labels.max() >= CLASSES:
        raise DataError(
            f"{label_path}: expected labels from 0 to {CLASSES - 1}, found {labels.max()}"
        )
    return images, labels


def _find(folder: Path, name: str) -> Path:
    """A file of the folder, as it is or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    found = "no such file" if folder.is_dir() else "no such folder"
    raise DataError(
        f"{folder / name}: {found}; expected a folder with {', '.join((*TRAIN, *TEST))}, each as "
        f"it is or with .gz; the Debian package {PACKAGE} puts Fashion-MNIST into {FOLDER}"
    )


def read_idx(path: Path, dimensions: int) -> Bytes:
    """An IDX file of unsigned bytes with that many dimensions.

    A magic number (two zeros, type, number of dimensions), the sizes as big-endian integers of 32
    bits, the elements.
    """
    content = _content(path)
    magic = bytes((0, 0, UNSIGNED_BYTES, dimensions))
    if content[:4] != magic:
        raise DataError(
            f"{path}: expected an IDX file that begins with {magic.hex(' ')}, "
            f"found {content[:4].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: expected {start} bytes of header, found {len(content)} in all")
    shape: tuple[Any, ...] = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    expected, found = int(np.prod(shape, dtype=object)), len(content) - start
    if found != expected:
        sizes = "×".join(map(str, shape))
        raise DataError(
            f"{path}: expected {expected} bytes after the header ({sizes}), found {found}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, OSError, zlib.error) as error:
        what = "a whole gzip file" if path.suffix == ".gz" else "a file that can be read"
        raise DataError(f"{path}: expected {what}, found: {error}") from error
