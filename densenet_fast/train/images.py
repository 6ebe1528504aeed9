"""Image files: which ones a folder has, and how each is read, upright and in its whole depth."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS

from densenet_fast.train.errors import DataError, UsageError, lack_of_memory

# What file systems, network storages and archives keep beside a user's files.
SYSTEM = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
MOST = 2**16 - 1  # of 16 bits


class Found(NamedTuple):
    """Images of a folder, and how many of its entries are none: hidden, or no regular files."""

    files: list[str]
    left_out: int


def left_out(count: int) -> str:
    """What is said of entries that are none."""
    return f"{count} hidden files and folders, or no regular files, left out"


def is_hidden(name: str) -> bool:
    """Whether an entry of a folder is not the user's: neither a class nor an image."""
    return name.startswith(".") or name in SYSTEM


def find_images(folder: str | Path) -> Found:
    """The images below a folder, through links, in the order of torchvision's ImageFolder.

    Raises:
        OSError: some folder cannot be read.
    """
    files: list[tuple[str, str]] = []
    count = 0
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        hidden = [name for name in (*folders, *names) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        images = [
            name for name in names if name.lower().endswith(IMG_EXTENSIONS) and not is_hidden(name)
        ]
        special = {name for name in images if _is_special(os.path.join(root, name))}
        count += len(hidden) + len(special)
        files.extend((root, name) for name in images if name not in special)
    return Found([os.path.join(*pair) for pair in sorted(files)], count)


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_special(path: str) -> bool:
    """Whether it is a pipe, a socket or a device, which may never end.

    A link that leads nowhere is not: it stands for an image, and is an error when it is read.
    """
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def image_files(path: Path) -> Found:
    """The images below a folder, or the file itself.

    Raises:
        UsageError: nothing there.
    """
    if path.is_dir():
        found = find_images(path)
        if not found.files:
            raise UsageError(f"{path}: no images in this folder ({', '.join(IMG_EXTENSIONS)})")
        return Found(sorted(found.files, key=Path), found.left_out)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if not path.is_file():
        raise UsageError(f"{path}: expected a regular file or a folder; - reads standard input")
    return Found([str(path)], 0)


def mode_of(channels: int) -> str:
    """PIL's mode of images of 1 or 3 channels."""
    return "L" if channels == 1 else "RGB"


def some_sizes(paths: Sequence[str], most: int = 100) -> list[tuple[int, int]]:
    """Width and height of up to so many images, evenly from all that can be read."""
    found = []
    for path in paths[:: max(1, -(-len(paths) // most))]:
        try:
            with Image.open(path) as image:
                found.append(image.size)
        except Exception as error:  # one that is corrupt is told when it is read
            if lack_of_memory(error):
                raise
    return found


def read_image(
    file: str | BinaryIO, mode: str, *, small: bool = False
) -> Image.Image | tv_tensors.Image:
    """An image as its EXIF orientation shows it.

    One of 16 bits per pixel is a tensor [1, H, W] of float32 from 0 to 1, which has them all.

    Args:
        file: its path or content.
        mode: PIL's "RGB" or "L", what one of 8 bits is converted to.
        small: decode JPEGs at an eighth of their size, which reads the whole file in less time.

    Raises:
        DataError: it cannot be decoded, or its pixels have no known white.
    """
    try:
        with Image.open(file) as image:
            if small:
                image.draft("RGB", (1, 1))
            image.load()
            _turn(image)
            return _deep(image) if _is_deep(image) else image.convert(mode)
    except DataError:
        raise
    except Exception as error:
        if lack_of_memory(error):
            raise
        raise DataError(f"{type(error).__name__}: {error}") from error


def _turn(image: Image.Image) -> None:
    """Damaged EXIF data have no orientation: the pixels are whole, and stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception as error:
            if lack_of_memory(error):
                raise


def _is_deep(image: Image.Image) -> bool:
    """Whether pixels have more than 8 bits.

    Raises:
        DataError: they are floating-point numbers.
    """
    if image.mode == "F":
        raise DataError("mode F: floating-point pixels have no known white; save 8 or 16 bits")
    return image.mode == "I" or image.mode.startswith("I;16")


def _deep(image: Image.Image) -> tv_tensors.Image:
    """16 bits per pixel as numbers from 0 to 1; PIL's own conversion clips them to white.

    Mode I (32 bits) is what PIL makes of 16 bits in PGM files and, before version 11, in PNG: it is
    taken for 16 bits whatever its values are, or two images of one camera would differ in scale.
    """
    values = np.asarray(image).astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > MOST:
        raise DataError(
            f"mode {image.mode}: expected pixels from 0 to {MOST}, found {low} to {high}"
        )
    return tv_tensors.Image(torch.from_numpy(values.astype(np.float32) / MOST)[None])


def decoding_error(file: str | BinaryIO) -> str | None:
    """Why an image cannot be decoded to its end, or None."""
    try:
        read_image(file, "RGB", small=True)
    except DataError as error:
        return str(error)
    return None
