"""From a checkpoint of `densenet-fast train` to a network in Python."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train import checkpoints
from densenet_fast.train.architecture import Architecture
from densenet_fast.train.errors import UsageError


class Loaded(NamedTuple):
    """A network in evaluation mode on the CPU, and what its inputs and outputs mean.

    Logits [N, classes] become probabilities by softmax where `task` is "multiclass"; by sigmoid
    where it is "multilabel", and each class is a label that applies or not.

    `preprocessing` says how an image becomes an input [C, crop, crop]: its shorter edge is resized
    to `resize` pixels by `interpolation` (None: not at all), a square of `crop` is cut from the
    centre, and of pixels from 0 to 1 `mean` is subtracted and the rest divided by `std`, one value
    of each per channel.
    """

    model: EfficientDenseNet
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    task: str


def load(path: str | os.PathLike[str], *, ema: bool = True) -> Loaded:
    """The network that `densenet-fast train` has saved in a checkpoint such as best.pt.

    Args:
        path: the checkpoint.
        ema: take the average of the weights where the training made one (`--model-ema`) that is
            no longer mainly what it began with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole checkpoint of `densenet-fast train`.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint {file}")
    try:
        content = checkpoints.read(file)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return built(content, ema=ema)


def built(content: checkpoints.Content, *, ema: bool) -> Loaded:
    """The network of a checkpoint that has been read."""
    model = Architecture(**content["architecture"]).build()
    model.load_state_dict(content[checkpoints.chosen(content, ema=ema)])
    classes = tuple(content["classes"])
    return Loaded(model.eval(), classes, dict(content["preprocessing"]), content["task"])
