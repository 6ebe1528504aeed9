"""Everything a run needs, made and checked before its first step."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train import networks
from densenet_fast.train.architecture import BC, Architecture
from densenet_fast.train.batches import Plain, loader, mixed_seed
from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import DataError, UsageError
from densenet_fast.train.folders import open_folder
from densenet_fast.train.images import left_out
from densenet_fast.train.loop import Placement
from densenet_fast.train.optimization import amp_type
from densenet_fast.train.sources import DIGITS, Samples, Source, open_source
from densenet_fast.train.transforms import Preprocessing, preprocessing

MOST_WORKERS = 8  # by default
CROP = 224  # of photographs in training, by default


@dataclass(frozen=True)
class Setting:
    """What all commands that read a data set share."""

    source: Source
    plain: Preprocessing
    workers: int


def default_model(arguments: Namespace) -> str:
    """The network that suits the data where --model does not say."""
    small = arguments.data in (None, DIGITS) and arguments.data_path is None
    return BC if small else "densenet121"


def settle(arguments: Namespace) -> None:
    """What is set for the whole process: threads, deterministic algorithms."""
    if getattr(arguments, "threads", None) is not None:
        torch.set_num_threads(arguments.threads)
    if getattr(arguments, "use_deterministic_algorithms", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def open_data(arguments: Namespace, processes: Processes, *, train: bool) -> Setting:
    """The data set of the arguments, and how its images become inputs.

    Raises:
        UsageError: unknown names, missing, wrong or corrupt files, sizes that do not fit.
    """
    if arguments.no_image_check and arguments.on_corrupt == "skip":
        raise UsageError("--on-corrupt skip needs the check that --no-image-check leaves out")
    if arguments.download:
        _fetch(arguments, processes)
    found = open_source(arguments.data, arguments.data_path, download=False)
    in_files = isinstance(found, Path)
    workers = arguments.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        workers = min(MOST_WORKERS, cores // processes.local_count) if in_files else 0
    if isinstance(found, Path):
        found = open_folder(
            found,
            on_corrupt=None if arguments.no_image_check else arguments.on_corrupt,
            workers=workers,
            processes=processes,
            visible=processes.main and not getattr(arguments, "no_progress", False),
            train=train,
        )
    if processes.main:
        # --json has standard output for itself.
        where = sys.stderr if getattr(arguments, "json", False) else sys.stdout
        if found.left_out:
            print(f"{found.name}: {left_out(found.left_out)}", file=where)
        if found.skipped:
            print(f"{found.name}: {found.skipped} corrupt images left out", file=where)
    plain = preprocessing(
        found.size,
        found.mean,
        found.std,
        resize=arguments.val_resize_size,
        crop=arguments.val_crop_size,
    )
    return Setting(found, plain, workers)


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
        for path, label in getattr(part, "samples", ()):
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


def architecture_of(arguments: Namespace, source: Source) -> Architecture:
    """The network of `train`'s arguments for these data."""
    return Architecture(
        model=arguments.model,
        num_classes=len(source.classes),
        in_channels=source.channels,
        drop_rate=arguments.drop_rate,
        depth=arguments.depth,
        growth_rate=arguments.growth_rate,
    )


def make_model(
    arguments: Namespace,
    architecture: Architecture,
    device: torch.device,
    *,
    resuming: bool,
) -> EfficientDenseNet:
    """The network on its device, the same on all processes.

    Raises:
        UsageError: weights, --freeze, --sync-bn or --checkpoint-mode cannot be had.
    """
    torch.manual_seed(arguments.seed)
    if arguments.weights is None or resuming:
        model = architecture.build()
    else:
        model = networks.pretrained(architecture, arguments.weights, exact=arguments.test_only)
    if arguments.freeze is not None:
        networks.freeze(model, arguments.freeze)
    networks.set_memory(model, arguments.checkpoint_mode, arguments.memory_budget)
    model.to(device)
    if arguments.channels_last:
        model.to(memory_format=torch.channels_last)
    return networks.synchronized(model, device) if arguments.sync_bn else model


def place(arguments: Namespace, device: torch.device) -> Placement:
    """Where and how `train`'s arguments compute."""
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    return Placement(device, layout, amp_type(arguments))


def seed_noise(seed: int, rank: int) -> None:
    """Other dropout on every process, the same in every run; Python's and NumPy's generators too.

    Nothing here draws from these two, but checkpoints have Python's, and other libraries may.
    """
    mixed = mixed_seed(seed, "noise", rank) % 2**32
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002  (the generator that everybody shares)


def note_threads(before: int) -> None:
    """Say when resuming is exact up to rounding alone: PyTorch's own sums depend on threads."""
    now = torch.get_num_threads()
    if now != before:
        print(f"{before} threads before, {now} now: rounding may differ (--threads {before})")


def check_batches(
    model: EfficientDenseNet,
    arguments: Namespace,
    source: Source,
    plain: Preprocessing,
    crop: int,
    last_batch: int,
) -> None:
    """Refuse batches that would fail in the middle of an epoch, and budgets too small.

    Raises:
        UsageError: what the network would say, or that a step does not fit.
    """
    model.eval()
    networks.check_images(model, 1, source.channels, plain.crop)
    if arguments.test_only:
        return
    model.train()
    for batch in sorted({last_batch, min(arguments.batch_size, len(source.train))}):
        networks.check_images(model, batch, source.channels, crop)
    shape = (arguments.batch_size, source.channels, crop, crop)
    networks.check_memory(model, shape, amp_type(arguments))


def check_output(folder: Path, *, resuming: bool, overwrite: bool, names: tuple[str, ...]) -> None:
    """Refuse to write over another training, and where TensorBoard cannot write.

    Raises:
        UsageError: there is one, or the folder's name is no UTF-8.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--output-dir {str(folder)!r}: TensorBoard needs a name in UTF-8"
        ) from error
    if resuming or overwrite:
        return
    for name in names:
        if (folder / name).exists():
            raise UsageError(
                f"{folder / name} is there already: go on with --resume auto, begin anew with "
                "--overwrite, or choose another --output-dir"
            )
