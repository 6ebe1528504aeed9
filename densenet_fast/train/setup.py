"""Everything a run needs, made and checked before its first step."""

from __future__ import annotations

import os
import random
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train import checkpoints, networks
from densenet_fast.train.architecture import BC, Architecture
from densenet_fast.train.arguments import AUTO
from densenet_fast.train.batches import mixed_seed
from densenet_fast.train.data import Setting
from densenet_fast.train.errors import UsageError, flag
from densenet_fast.train.loop import Placement
from densenet_fast.train.optimization import amp_type
from densenet_fast.train.sources import DIGITS, Source
from densenet_fast.train.tasks import Criterion, Task
from densenet_fast.train.transforms import (
    RATIO,
    SCALE,
    Augmentation,
    Transform,
)


def default_model(arguments: Namespace) -> str:
    """The network that suits the data where --model does not say."""
    given = (arguments.data_path, arguments.labels)
    small = arguments.data in (None, DIGITS) and given == (None, None)
    return BC if small else "densenet121"


def resumed_path(arguments: Namespace) -> Path | None:
    """The checkpoint that --resume names."""
    if arguments.resume is None:
        return None
    auto = arguments.resume == AUTO
    return arguments.output_dir / checkpoints.LAST if auto else Path(arguments.resume)


def adopt(arguments: Namespace) -> None:
    """Where --weights is a checkpoint of `train`, take from it what no flag says.

    This is the network, the channels with their means and deviations, and the sizes. When training
    goes on, what was taken at its start is in the checkpoint that it goes on from.

    Raises:
        UsageError: flags ask for another network than the checkpoint has.
    """
    if arguments.weights is None:
        return
    path, resumed = Path(arguments.weights), resumed_path(arguments)
    resuming = resumed is not None and resumed.exists()
    if resuming:
        assert resumed is not None
        path = resumed
    elif not path.is_file() or not checkpoints.is_checkpoint(path):
        return
    content = checkpoints.read(path)
    before, network, plain = (
        content[name] for name in ("arguments", "architecture", "preprocessing")
    )
    for name in ("model", "depth", "growth_rate"):
        given = getattr(arguments, name)
        if given is not None and given != network[name]:
            raise UsageError(
                f"{flag(name)} {given} is not what {path} has: {Architecture(**network)}"
            )
    crop = before.get("train_crop_size")
    found = {
        **network,
        "in_chans": network["in_channels"],
        "mean": list(plain["mean"]),
        "std": list(plain["std"]),
        "val_resize_size": plain["resize"],
        "val_crop_size": plain["crop"],
        "train_crop_size": crop if type(crop) is int and crop > 0 else plain["crop"],
        "interpolation": plain["interpolation"],
    }
    names = ["model", "depth", "growth_rate", "in_chans", "train_crop_size", "interpolation"]
    if arguments.in_chans in (None, network["in_channels"]):
        names += ["mean", "std"]
    if (arguments.val_resize_size, arguments.val_crop_size) == (None, None):
        names += ["val_crop_size", *(["val_resize_size"] if arguments.crop_pct is None else [])]
    for name in names:
        taken = not resuming or before.get(name) is not None
        if getattr(arguments, name) is None and taken:
            setattr(arguments, name, found[name])


def settle(arguments: Namespace) -> None:
    """What is set for the whole process: threads, deterministic algorithms."""
    if getattr(arguments, "threads", None) is not None:
        torch.set_num_threads(arguments.threads)
    if getattr(arguments, "use_deterministic_algorithms", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


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


def training_transform(arguments: Namespace, setting: Setting, crop: int) -> Transform:
    """From an image of training to the network's input."""
    plain, source = setting.plain, setting.source
    if arguments.no_aug:
        resize = plain.resize if plain.crop == crop else crop
        return replace(plain, resize=resize, crop=crop).transform()
    shifted = source.size is not None and arguments.ratio is None
    augmentation = Augmentation(
        crop,
        arguments.scale or (None if shifted else SCALE),
        hflip=(0.5 if source.flip else 0.0) if arguments.hflip is None else arguments.hflip,
        vflip=arguments.vflip,
        jitter=arguments.color_jitter,
        policy=arguments.auto_augment,
        erase=arguments.random_erase,
        ratio=arguments.ratio or RATIO,
    )
    return augmentation.transform(plain, source.size)


def criterion(arguments: Namespace, task: Task, source: Source, device: torch.device) -> Criterion:
    """The loss of training."""
    weights = None
    if arguments.class_weights is not None:
        labels = getattr(source.train, "labels", getattr(source.train, "targets", None))
        weights = task.balance(torch.as_tensor(labels)).to(device)
    return task.criterion(weights, arguments.label_smoothing)


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
    model: EfficientDenseNet, arguments: Namespace, setting: Setting, crop: int, epoch: int
) -> None:
    """Refuse batches that would fail in the middle of an epoch, and budgets too small.

    Args:
        model: the network.
        arguments: of `train`.
        setting: the data.
        crop: what images of training are cut to.
        epoch: how many images an epoch has for each process.

    Raises:
        UsageError: what the network would say, or that a step does not fit.
    """
    channels, most = setting.source.channels, arguments.batch_size
    model.eval()
    networks.check_images(model, 1, channels, setting.plain.crop)
    if arguments.test_only:
        return
    model.train()
    for batch in sorted({epoch % most or most, min(most, epoch)}):
        networks.check_images(model, batch, channels, crop)
    networks.check_memory(model, (most, channels, crop, crop), amp_type(arguments))


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
