"""Folders of images by class, and which files cannot be decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError
from densenet_fast.train.images import decoding_error, find_images, is_hidden, read_image
from densenet_fast.train.signals import leave_signals_to_parent
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD, Source

PARTS = ("train", "val")


class FileSamples:
    """Images in files, by path and label."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        """How many."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One image and its label."""
        path, label = self.samples[index]
        return read_image(path, "RGB"), label


class _Part(NamedTuple):
    """train/ or val/ as it is found: classes, the images' paths and labels."""

    classes: list[str]
    samples: list[tuple[str, int]]
    left_out: int


class _Decoded:
    """For a loader: what is wrong with each file, "" where nothing is."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        return decoding_error(self.paths[index]) or ""


def find_corrupt(
    paths: Sequence[str], workers: int, processes: Processes, *, visible: bool
) -> dict[str, str]:
    """The files that cannot be decoded, with the reason; each process looks at its share."""
    mine = list(paths[processes.rank :: processes.count])
    loader: DataLoader[str] = DataLoader(
        _Decoded(mine),  # type: ignore[arg-type]
        batch_size=64,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_parent,
    )
    found: dict[str, str] = {}
    hidden = None if visible else True  # None: without a terminal
    with tqdm(total=len(mine), desc="checking images", disable=hidden, leave=False) as bar:
        at = 0
        for reasons in loader:
            for reason in reasons:
                if reason:
                    found[mine[at]] = reason
                at += 1
            bar.update(len(reasons))
    together: dict[str, str] = {}
    for part in processes.gather(found):
        together.update(part)
    return dict(sorted(together.items()))


def open_folder(
    folder: Path,
    *,
    on_corrupt: str | None,
    workers: int,
    processes: Processes,
    visible: bool = True,
    train: bool = True,
) -> Source:
    """The images of `folder`/train and `folder`/val, where every file has been decoded once.

    Args:
        folder: has train/ and val/, each with one folder of images per class.
        on_corrupt: "error" or "skip" for files that cannot be decoded, None to decode none.
        workers: processes that decode.
        processes: those that train together.
        visible: whether to show progress.
        train: whether train/ is needed; without it, val/ alone is looked at.

    Raises:
        DataError: no classes, other ones in val/ than in train/, or a corrupt file.
    """
    names = PARTS if train else PARTS[1:]
    parts = {name: _find(folder / name) for name in names}
    classes = parts["val"].classes
    if train and parts["train"].classes != classes:
        only = [
            f"{', '.join(sorted(set(parts[a].classes) - set(parts[b].classes)))} in {a}/ alone"
            for a, b in (PARTS, PARTS[::-1])
            if set(parts[a].classes) - set(parts[b].classes)
        ]
        raise DataError(
            f"{folder}: expected the same classes in train/ and val/: {'; '.join(only)}"
        )
    if len(classes) < 2:
        raise DataError(f"{folder}: expected two classes at least, found {classes[0]} alone")
    paths = [path for name in names for path, _ in parts[name].samples if on_corrupt is not None]
    corrupt = find_corrupt(paths, workers, processes, visible=visible)
    if corrupt and on_corrupt == "error":
        path, reason = next(iter(corrupt.items()))
        more = "" if len(corrupt) == 1 else f", and {len(corrupt) - 1} more"
        raise DataError(
            f"corrupt image {path} ({reason}){more}: repair or remove it, or leave such files "
            "out with --on-corrupt skip"
        )
    whole: dict[str, FileSamples] = {}
    for name in names:
        samples = [row for row in parts[name].samples if row[0] not in corrupt]
        bare = sorted(set(range(len(classes))) - {label for _, label in samples})
        if bare and (not samples or name == "train"):
            raise DataError(f"{folder / name}: no image of {classes[bare[0]]} can be decoded")
        whole[name] = FileSamples(samples)
    return Source(
        name=str(folder),
        train=whole[names[0]],
        val=whole["val"],
        classes=tuple(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=None,
        flip=True,
        skipped=len(corrupt),
        left_out=sum(part.left_out for part in parts.values()),
    )


def _find(folder: Path) -> _Part:
    """The images of a folder with one folder per class."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected train/ and val/ with one per class")
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir() for entry in entries}
        classes = sorted(name for name in names if names[name] and not is_hidden(name))
        found = [find_images(folder / name) for name in classes]
    except OSError as error:
        raise DataError(f"{folder}: {error}") from error
    if not classes:
        raise DataError(f"{folder}: cannot find any class; expected one folder of images for each")
    empty = [name for name, images in zip(classes, found, strict=True) if not images.files]
    if empty:
        raise DataError(f"{folder}: no images of {', '.join(empty)} ({', '.join(IMG_EXTENSIONS)})")
    samples = [(path, label) for label, images in enumerate(found) for path in images.files]
    hidden = sum(map(is_hidden, names))
    return _Part(classes, samples, hidden + sum(images.left_out for images in found))
