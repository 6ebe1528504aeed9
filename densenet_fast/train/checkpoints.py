"""Checkpoints: what they hold, and whether a run may go on from one."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from densenet_fast.train import entries
from densenet_fast.train.architecture import BC, Architecture
from densenet_fast.train.errors import UsageError, flag, lack_of_memory
from densenet_fast.train.storage import link_atomically, write_atomically
from densenet_fast.weights import checkpoint_files

FORMAT = "densenet_fast training checkpoint, version 1"
LAST, BEST = "last.pt", "best.pt"
NEAR = 0.5  # the share of an average's first weights in it, above which it is near its start
Content = dict[str, Any]
# Flags that may differ when training goes on: none of them changes what a step computes. The data
# are compared themselves, and so is the network.
HARMLESS = frozenset(
    (
        "class_map",
        "command",
        "data",
        "data_path",
        "download",
        "epochs",
        "labels",
        "no_image_check",
        "no_progress",
        "output_dir",
        "overwrite",
        "patience",
        "print_freq",
        "rendezvous_timeout",
        "resume",
        "save_steps",
        "steps",
        "test_only",
        "val_labels",
        "workers",
    )
)
# What checkpoints say of the data, and how it is called in messages.
DATA = (
    ("train", "training images"),
    ("val", "validation images"),
    ("digest", "digest of the list of images"),
    ("preprocessing", "preprocessing"),
)


def plain(arguments: Namespace) -> Content:
    """The arguments as plain data."""
    return {name: _plain(value) for name, value in sorted(vars(arguments).items())}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


def serialized(content: Content) -> bytes:
    """A checkpoint's bytes, which `torch.load(weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    return buffer.getvalue()


def save(folder: Path, content: Content, *, best: bool) -> None:
    """Write last.pt, and best.pt as well if it is the best.

    best.pt comes first: a crash in between repeats the epoch, and finds the same best once more.

    Raises:
        UsageError: the disk is full; the checkpoints are the old ones.
    """
    data = serialized(content)
    if best:
        write_atomically(folder / BEST, data)
        link_atomically(folder / BEST, folder / LAST)
    else:
        write_atomically(folder / LAST, data)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of `densenet-fast train`, not weights of another origin."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever torch.load meets first in a file of another kind
        if lack_of_memory(error):
            raise
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read(path: Path) -> Content:
    """A checkpoint of `densenet-fast train`, its tensors on the CPU, every entry as it must be.

    Raises:
        UsageError: there is none, or the file is damaged, altered or something else.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint {path}")
    if not path.is_file():  # a pipe or a device might never end
        raise UsageError(f"{path} is no checkpoint: expected a regular file")
    try:
        checkpoint_files.mappable(path)  # compares checksums, as torch.load does not
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch.load meets first in a damaged file
        if lack_of_memory(error):
            raise
        first = (str(error).splitlines() or ["nothing in it"])[0]
        raise UsageError(
            f"{path} is no whole checkpoint: {first} ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(
            f"{path} is no checkpoint of densenet-fast train: expected format {FORMAT!r}; weights "
            "alone are for --weights"
        )
    if missing := entries.NEEDED.keys() - content.keys():
        raise UsageError(f"{path} is no whole checkpoint: it has no {', '.join(sorted(missing))}")
    try:
        for name, check in {**entries.NEEDED, **entries.TRAINING}.items():
            if name in content:
                check(content[name], name)
        _check_whole(content)
    except UsageError as error:
        raise UsageError(f"{path} is no whole checkpoint: {error}") from error
    return content


def _check_whole(content: Content) -> None:
    """Refuse entries that do not fit each other."""
    architecture = Architecture(**content["architecture"])
    for name in ("depth", "growth_rate"):
        if (getattr(architecture, name) is None) == (architecture.model == BC):
            raise UsageError(f"architecture: {name} is of {BC} alone, got {architecture}")
    classes, channels = architecture.num_classes, architecture.in_channels
    if len(content["classes"]) != classes:
        raise UsageError(
            f"classes: expected {classes} names, as the network has {classes} classes, got "
            f"{len(content['classes'])}"
        )
    for name in ("mean", "std"):
        found = content["preprocessing"][name]
        if len(found) != channels:
            raise UsageError(
                f"preprocessing[{name!r}]: expected {channels} values, one per channel, got {found}"
            )
    expected = architecture.skeleton().state_dict()
    for name in ("model", "ema"):
        if content[name] is not None:
            entries.check_tensors(name, content[name], expected)


def chosen(content: Content, *, ema: bool = True) -> str:
    """The entry with the weights to use: averaged ones, where they are and are wanted.

    An average that is near its start is none yet.
    """
    if not ema or content["ema"] is None:
        return "model"
    history = content.get("history")
    return "model" if history and near_start(history[-1]) else "ema"


def near_start(row: Mapping[str, float]) -> bool:
    """Whether the average is mainly what it began with, after the epoch of a row."""
    return row.get(entries.EMA_START, 0.0) > NEAR


def score(row: Mapping[str, float], figure: str) -> float:
    """How good the weights are that `chosen` takes, after the epoch of a row."""
    averaged = entries.EMA_START in row and not near_start(row)
    return row[f"{'ema_' if averaged else ''}val_{figure}"]


def check_network(
    path: Path, content: Content, architecture: Architecture, classes: Sequence[str]
) -> None:
    """Refuse a checkpoint of another network or of other classes.

    Raises:
        UsageError: it is.
    """
    found = Architecture(**content["architecture"])
    if found != architecture:
        raise UsageError(f"{path} is of another network: {found}; expected {architecture}")
    if list(content["classes"]) != list(classes):
        raise UsageError(
            f"{path} is of other classes: {_some(content['classes'])}; the data have "
            f"{_some(classes)}"
        )


def check_settings(
    path: Path, content: Content, arguments: Namespace, data: Content, processes: int
) -> None:
    """Refuse a checkpoint of a run that these arguments would not have started.

    Raises:
        UsageError: other data or other flags; all differences are named.
    """
    if missing := entries.TRAINING.keys() - content.keys():
        raise UsageError(f"{path} has no {', '.join(sorted(missing))}: it cannot be gone on from")
    before, now = content["arguments"], plain(arguments)
    different = [
        f"{flag(name)} was {before.get(name)} and is {now.get(name)}"
        for name in sorted({*before, *now} - HARMLESS)
        if before.get(name) != now.get(name)
    ]
    for name, text in DATA:
        if content["data"][name] != data[name]:
            different.append(f"{text}: {content['data'][name]} before, {data[name]} now")
    for name, count in (
        ("processes", content["processes"]),
        ("by_process", len(content["by_process"])),
    ):
        if count != processes:
            different.append(f"{name}: {count} before, {processes} now")
    if different:
        raise UsageError(
            f"{path} cannot go on with other settings: {'; '.join(different)}. Other results "
            "would come of it; --weights starts anew from its weights"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:5])
    return f"{len(names)} ({shown}{', ...' if len(names) > 5 else ''})"
