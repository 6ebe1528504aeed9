"""The data set of a command: what flags ask for, opened, and how its images become inputs."""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from densenet_fast.train.architecture import BC
from densenet_fast.train.batches import Plain, loader
from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError, UsageError, flag
from densenet_fast.train.folders import FileSamples, ImageCheck, open_folder
from densenet_fast.train.images import left_out, mode_of, some_sizes
from densenet_fast.train.labels import Reading, open_labels
from densenet_fast.train.sources import Samples, Source, open_source
from densenet_fast.train.splits import Split
from densenet_fast.train.transforms import Preprocessing, preprocessing, with_sizes

MOST_WORKERS = 8  # by default
MOST_SMALL = 64  # pixels of what a DenseNet-BC takes for small, by default


@dataclass(frozen=True)
class Setting:
    """What all commands that read a data set share.

    `edge` is what training cuts images to where no flag says it.
    """

    source: Source
    plain: Preprocessing
    workers: int
    edge: int


class Expected(NamedTuple):
    """What a trained network expects of images in files: their channels, and a table's labels.

    `others` tells whether a table may name labels that are none of the network's.
    """

    channels: int
    classes: tuple[str, ...] | None
    others: bool


def open_data(
    arguments: Namespace, processes: Processes, *, train: bool, expected: Expected | None = None
) -> Setting:
    """The data set of the arguments, and how its images become inputs.

    Args:
        arguments: of `train` or `evaluate`.
        processes: those that train together.
        train: whether images of training are needed.
        expected: what the network is for, where it is trained already.

    Raises:
        UsageError: unknown names, missing, wrong or corrupt files, sizes that do not fit.
    """
    if arguments.no_image_check and arguments.on_corrupt == "skip":
        raise UsageError("--on-corrupt skip needs the check that --no-image-check leaves out")
    if arguments.labels is not None and (arguments.data is not None or arguments.download):
        given = "--download" if arguments.data is None else f"--data {arguments.data}"
        raise UsageError(
            f"{given} does not go with --labels: --data-path says where its images are"
        )
    if arguments.download:
        _fetch(arguments, processes)
    in_files = arguments.labels is not None
    found = None if in_files else open_source(arguments.data, arguments.data_path, download=False)
    in_files = in_files or isinstance(found, Path)
    workers = arguments.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        workers = min(MOST_WORKERS, cores // processes.local_count) if in_files else 0
    if isinstance(found, Source):
        for name in ("val_split", "class_map"):
            if getattr(arguments, name, None) is not None:
                raise UsageError(f"{flag(name)} applies to images in files, not to {found.name}")
    else:
        check = ImageCheck(
            None if arguments.no_image_check else arguments.on_corrupt,
            workers,
            processes,
            visible=processes.main and not getattr(arguments, "no_progress", False),
        )
        found = _open_files(arguments, found, check, train=train, expected=expected)
    if expected is None:
        found = _with_channels(found, arguments.in_chans, arguments.mean, arguments.std)
    elif in_files:
        found = _with_channels(found, expected.channels)
    # --json has standard output for itself.
    where = sys.stderr if getattr(arguments, "json", False) else sys.stdout
    found, plain, own = _sized(found, arguments)
    if processes.main:
        if found.left_out:
            print(f"{found.name}: {left_out(found.left_out)}", file=where)
        if found.skipped:
            print(f"{found.name}: {found.skipped} corrupt images left out", file=where)
        for said in (found.note, own):
            if said:
                print(said, file=where)
    return Setting(found, with_sizes(plain, arguments), workers, edge=plain.crop)


def _open_files(
    arguments: Namespace,
    folder: Path | None,
    check: ImageCheck,
    *,
    train: bool,
    expected: Expected | None,
) -> Source:
    """Images in files: by a table of labels, or a folder of classes."""
    channels = (
        (getattr(arguments, "in_chans", None) or 3) if expected is None else expected.channels
    )
    share = getattr(arguments, "val_split", None)
    split = None if share is None else Split(share, arguments.seed)
    mode = mode_of(channels)
    if arguments.labels is None:
        assert folder is not None
        return open_folder(
            folder, check, mode=mode, class_map=arguments.class_map, split=split, train=train
        )
    root = arguments.data_path
    if root is not None and not root.is_dir():
        raise UsageError(f"--data-path {root}: no such folder")
    reading = Reading(
        root,
        arguments.uncertain,
        arguments.missing,
        group=getattr(arguments, "group_column", None),
        others=expected.others if expected else arguments.label_names is not None,
    )
    return open_labels(
        arguments.labels,
        reading,
        check,
        classes=expected.classes if expected else arguments.label_names,
        val=split or getattr(arguments, "val_labels", None),
        mode=mode,
    )


def _with_channels(
    source: Source,
    channels: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """The data with so many channels, and such means and deviations, where they are given."""
    channels = channels or source.channels
    found: list[tuple[float, ...]] = []
    for name, given, own in (("--mean", mean, source.mean), ("--std", std, source.std)):
        values = tuple(given or own)
        if given is None and channels == 1:
            values = (sum(own) / len(own),)
        if len(values) not in (1, channels):
            raise UsageError(
                f"{name}: expected {channels} values, one per channel, got {len(values)}"
            )
        found.append(values * (channels // len(values)))
    return replace(source, mean=found[0], std=found[1])


def _sized(source: Source, arguments: Namespace) -> tuple[Source, Preprocessing, str]:
    """The data and the sizes that suit them and the network, and what there is to say of that."""
    mean, std = source.mean, source.std
    if getattr(arguments, "model", None) != BC or source.size is not None:
        return source, preprocessing(source.size, mean, std), ""
    edge = arguments.train_crop_size or arguments.val_crop_size
    if edge is not None:
        return source, Preprocessing(edge, edge, mean, std), ""
    assert isinstance(source.train, FileSamples)
    sizes = some_sizes(source.train.paths)
    edge = min(MOST_SMALL, sorted(map(min, sizes))[len(sizes) // 2] if sizes else MOST_SMALL)
    if set(sizes) == {(edge, edge)}:
        source = replace(source, size=edge)
    said = (
        f"{source.name}: {edge}×{edge} pixels by the images' own sizes, at most {MOST_SMALL}, as "
        f"{BC} is for small ones; --train-crop-size and --val-crop-size choose others"
    )
    return source, Preprocessing(None if source.size else edge, edge, mean, std), said


def _fetch(arguments: Namespace, processes: Processes) -> None:
    """On every machine one process fetches the data set, and the others find it there."""
    failed = None
    if processes.local_rank == 0:
        try:
            open_source(arguments.data, arguments.data_path, download=True)
        except UsageError as error:
            failed = str(error)
    for text in processes.gather(failed):
        if text is not None:
            raise DataError(text)


def described(setting: Setting) -> dict[str, Any]:
    """What checkpoints say of the data, to know them again."""
    source = setting.source
    digest = hashlib.blake2b(digest_size=8)  # of names and labels, where images are files
    parts: tuple[Samples, ...] = (source.train, source.val)
    for part in parts:
        if isinstance(part, FileSamples):
            for path, label in zip(part.paths, part.labels.tolist(), strict=True):
                row = f"{'/'.join(Path(path).parts[-2:])}\0{label}\n"
                digest.update(row.encode(errors="surrogateescape"))
    return {
        "train": len(source.train),
        "val": len(source.val),
        "digest": digest.hexdigest(),
        "preprocessing": setting.plain.to_dict(),
    }


def validation_loader(
    setting: Setting, batch_size: int, processes: Processes, device: torch.device
) -> Any:
    """The validation images of one of the processes."""
    images = Plain(setting.source.val, setting.plain.transform(), processes)
    return loader(images, setting.workers, device, batch_size=batch_size)
