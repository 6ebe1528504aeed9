"""Folders of images: their classes, and which files cannot be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError, UsageError
from densenet_fast.train.signals import leave_signals_to_parent
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD, Source

PARTS = ("train", "val")


def decoding_error(path: str | Path) -> str | None:
    """Why an image cannot be decoded to its end, or None.

    JPEGs are decoded at an eighth of their size, which reads the whole file in less time.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


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
    parts: dict[str, Any] = {name: _open(folder / name) for name in names}
    val = parts["val"]
    if train and parts["train"].classes != val.classes:
        only = [
            f"{', '.join(sorted(set(parts[a].classes) - set(parts[b].classes)))} in {a}/ alone"
            for a, b in (PARTS, PARTS[::-1])
            if set(parts[a].classes) - set(parts[b].classes)
        ]
        raise DataError(
            f"{folder}: expected the same classes in train/ and val/: {'; '.join(only)}"
        )
    if len(val.classes) < 2:
        raise DataError(f"{folder}: expected two classes at least, found {val.classes[0]} alone")
    paths = [path for name in names for path, _ in parts[name].samples if on_corrupt is not None]
    corrupt = find_corrupt(paths, workers, processes, visible=visible)
    if corrupt and on_corrupt == "error":
        path, reason = next(iter(corrupt.items()))
        more = "" if len(corrupt) == 1 else f", and {len(corrupt) - 1} more"
        raise DataError(
            f"corrupt image {path} ({reason}){more}: repair or remove it, or leave such files "
            "out with --on-corrupt skip"
        )
    for name in names:
        part = parts[name]
        part.samples = part.imgs = [row for row in part.samples if row[0] not in corrupt]
        part.targets = [label for _, label in part.samples]
        bare = sorted(set(range(len(val.classes))) - set(part.targets))
        if bare and (not part.samples or name == "train"):
            raise DataError(f"{folder / name}: no image of {val.classes[bare[0]]} can be decoded")
    return Source(
        name=str(folder),
        train=parts[names[0]],
        val=val,
        classes=tuple(val.classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=None,
        flip=True,
        skipped=len(corrupt),
    )


def _open(folder: Path) -> Any:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected train/ and val/ with one per class")
    try:
        return ImageFolder(folder)
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{folder}: {error}") from error


def image_files(path: Path) -> list[Path]:
    """The images below a folder, in order, or the file itself.

    Raises:
        UsageError: nothing there.
    """
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
        )
        if not files:
            raise UsageError(f"{path}: no images in this folder ({', '.join(IMG_EXTENSIONS)})")
        return files
    if not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    return [path]
