"""Folders of images by class, and which files cannot be decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from densenet_fast.train.batches import read_batches
from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError
from densenet_fast.train.images import decoding_error, find_images, is_hidden, read_image
from densenet_fast.train.signals import leave_signals_to_parent
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD, Source
from densenet_fast.train.splits import Split

PARTS = ("train", "val")


class FileSamples:
    """Images in files, with labels: classes [N], or what is said of several labels [N, classes]."""

    def __init__(self, paths: Sequence[str], labels: Tensor, mode: str) -> None:
        self.paths, self.labels, self.mode = paths, labels, mode

    def __len__(self) -> int:
        """How many."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """One image and its label or labels."""
        return read_image(self.paths[index], self.mode), self.labels[index]


class ImageCheck(NamedTuple):
    """Looks for images that cannot be decoded.

    `on_corrupt` is "error" or "skip", None to decode none; `workers` are the processes that decode
    for each of `processes`, those that train together.
    """

    on_corrupt: str | None
    workers: int
    processes: Processes
    visible: bool = True  # whether to show progress

    def corrupt(self, paths: Sequence[str]) -> dict[str, str]:
        """The files that cannot be decoded, to leave out, with the reason.

        Raises:
            DataError: there are some, and `on_corrupt` is "error".
        """
        if self.on_corrupt is None:
            return {}
        found = find_corrupt(paths, self.workers, self.processes, visible=self.visible)
        if found and self.on_corrupt == "error":
            path, reason = next(iter(found.items()))
            more = "" if len(found) == 1 else f", and {len(found) - 1} more"
            raise DataError(
                f"corrupt image {path} ({reason}){more}: repair or remove it, or leave such files "
                "out with --on-corrupt skip"
            )
        return found


class _Part(NamedTuple):
    """train/ or val/ as it is found: classes, and each image's path and class."""

    classes: list[str]
    samples: list[tuple[str, str]]
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
        for reasons in read_batches(loader):
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
    check: ImageCheck,
    *,
    mode: str = "RGB",
    class_map: Path | None = None,
    split: Split | None = None,
    train: bool = True,
) -> Source:
    """The images of `folder`/train and `folder`/val, each with one folder of images per class.

    Args:
        folder: has train/ and val/.
        check: looks for images that cannot be decoded.
        mode: PIL's "RGB" or "L", what images are converted to.
        class_map: a file with the names of the classes in order, one a line; None: sorted.
        split: what of train/, or of the folder itself where there is none, is held out as val/.
        train: whether images of training are needed; without, val/ alone is looked at, or the
            folder itself where there is neither.

    Raises:
        DataError: no classes, other ones in val/ than in train/, or a corrupt file.
    """
    if split is not None:
        train_part, val_part = _divided(folder, split)
    else:
        alone = not train and not any((folder / name).is_dir() for name in PARTS)
        names = PARTS if train else ("" if alone else "val",)
        found = [_find(folder / name) for name in names]
        train_part, val_part = found[0], found[-1]
    parts = {"train": train_part, "val": val_part} if train else {"val": val_part}
    classes = val_part.classes
    if train and train_part.classes != classes:
        only = [
            f"{', '.join(sorted(set(parts[a].classes) - set(parts[b].classes)))} in {a}/ alone"
            for a, b in (PARTS, PARTS[::-1])
            if set(parts[a].classes) - set(parts[b].classes)
        ]
        raise DataError(
            f"{folder}: expected the same classes in train/ and val/: {'; '.join(only)}"
        )
    order = classes if class_map is None else _read_class_map(class_map, classes, folder)
    if len(order) < 2:
        raise DataError(f"{folder}: expected two classes at least, found {order[0]} alone")
    corrupt = check.corrupt([path for part in parts.values() for path, _ in part.samples])
    number = {name: at for at, name in enumerate(order)}
    whole: dict[str, FileSamples] = {}
    for name, part in parts.items():
        rows = [(path, number[label]) for path, label in part.samples if path not in corrupt]
        bare = sorted(set(range(len(order))) - {label for _, label in rows})
        if bare and (not rows or name == "train"):
            raise DataError(f"{folder / name}: no image of {order[bare[0]]} can be decoded")
        labels = torch.tensor([label for _, label in rows])
        whole[name] = FileSamples([path for path, _ in rows], labels, mode)
    return Source(
        name=str(folder),
        train=whole.get("train", whole["val"]),
        val=whole["val"],
        classes=tuple(order),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=None,
        flip=True,
        skipped=len(corrupt),
        left_out=train_part.left_out + (val_part.left_out if train_part is not val_part else 0),
    )


def _divided(folder: Path, split: Split) -> tuple[_Part, _Part]:
    """The images that are in no val/ yet, a share of each class held out."""
    if (folder / "val").is_dir():
        raise DataError(f"{folder / 'val'} is there: --val-split is for folders without it")
    where = folder / "train" if (folder / "train").is_dir() else folder
    part = _find(where)
    samples: tuple[list[tuple[str, str]], ...] = ([], [])
    for name, group in groupby(part.samples, key=lambda row: row[1]):
        rows = list(group)
        try:
            names = [os.path.relpath(path, where) for path, _ in rows]
            chosen = split.held_out(names, torch.empty(len(names), 0))
        except DataError as error:
            raise DataError(f"{where / name}: {error}") from error
        for row, inside in zip(rows, chosen, strict=True):
            samples[inside].append(row)
    return part._replace(samples=samples[0]), _Part(part.classes, samples[1], 0)


def _read_class_map(path: Path, classes: Sequence[str], folder: Path) -> list[str]:
    """Names of classes in order, among them those of all folders."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"--class-map {path}: {error}") from error
    order = [os.fsdecode(line.strip()) for line in lines if line.strip()]
    for name in order:
        if order.count(name) > 1:
            raise DataError(f"--class-map {path}: {name!r} is there twice")
    if others := [name for name in classes if name not in order]:
        raise DataError(f"--class-map {path}: it has no {others[0]!r}, a class of {folder}")
    return order


def _find(folder: Path) -> _Part:
    """The images of a folder with one folder per class."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected train/ and val/ with one per class, or "
            "--val-split, which holds some images out where there is no val/"
        )
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
    samples = [
        (file, name) for name, images in zip(classes, found, strict=True) for file in images.files
    ]
    hidden = sum(map(is_hidden, names))
    return _Part(classes, samples, hidden + sum(images.left_out for images in found))
