"""Images in IDX files, the format of MNIST and its relatives, from a folder."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from densenet_fast.train.errors import DataError

PACKAGE = "dataset-fashion-mnist"  # of Debian and Ubuntu
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where that package puts the files
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

SIZE = 28  # pixels, height and width
CLASSES = 10
UNSIGNED_BYTES = 0x08  # type of the elements in an IDX file's magic number

Bytes = npt.NDArray[np.uint8]


def read_pair(folder: Path, names: tuple[str, str]) -> tuple[Bytes, Bytes]:
    """Images [N, 28, 28] and their labels [N], which must fit each other.

    Raises:
        DataError: a file is not there, or not what it should be.
    """
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


def is_folder(folder: Path) -> bool:
    """Whether a folder looks like one of IDX files."""
    return any(
        (folder / f"{name}{end}").is_file() for name in (*TRAIN, *TEST) for end in ("", ".gz")
    )


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
