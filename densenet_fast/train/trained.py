"""A trained network for `evaluate` and `predict`: from a checkpoint, or ImageNet's by name."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train import checkpoints
from densenet_fast.train.architecture import IMAGENET_CLASSES, Architecture
from densenet_fast.train.errors import UsageError
from densenet_fast.train.loading import built
from densenet_fast.train.networks import pretrained
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD
from densenet_fast.train.tasks import Multiclass, Task, make_task
from densenet_fast.train.transforms import Preprocessing, preprocessing, with_sizes


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, with what its inputs and outputs mean."""

    model: EfficientDenseNet
    classes: tuple[str, ...]
    plain: Preprocessing
    of_data: bool  # whether data have these very classes; ImageNet's folders have other names
    task: Task
    arguments: Mapping[str, Any]  # of its training, if that is known

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.plain.mean)


def load(arguments: Namespace, device: torch.device) -> Trained:
    """The network of --checkpoint, or of --model and --weights.

    Raises:
        UsageError: there is no such file, or it is something else; sizes that do not fit.
    """
    found = _imagenet(arguments) if arguments.checkpoint is None else _from_checkpoint(arguments)
    found.model.to(device).eval()
    return replace(found, plain=with_sizes(found.plain, arguments))


def _imagenet(arguments: Namespace) -> Trained:
    from torchvision.models import get_model_weights

    path = Path(arguments.weights)
    if path.is_file() and checkpoints.is_checkpoint(path):
        raise UsageError(
            f"--weights {path} is a checkpoint of densenet-fast train: --checkpoint takes it"
        )
    architecture = Architecture(arguments.model, IMAGENET_CLASSES, 3)
    model = pretrained(architecture, arguments.weights, exact=True)
    weights = next(iter(get_model_weights("densenet121")))
    plain = preprocessing(None, IMAGENET_MEAN, IMAGENET_STD)
    classes, task = tuple(weights.meta["categories"]), Multiclass(IMAGENET_CLASSES)
    return Trained(model, classes, plain, of_data=False, task=task, arguments={})


def _from_checkpoint(arguments: Namespace) -> Trained:
    content = checkpoints.read(arguments.checkpoint)
    if arguments.no_ema and content["ema"] is None:
        raise UsageError(f"--no-ema: {arguments.checkpoint} was trained without --model-ema")
    found = built(content, ema=not arguments.no_ema)
    if content["ema"] is not None and not arguments.no_ema and checkpoints.chosen(content) != "ema":
        print(
            f"{arguments.checkpoint}: the average of the weights is near its start, the weights "
            "themselves are used",
            file=sys.stderr,
        )
    return Trained(
        found.model,
        found.classes,
        Preprocessing(**found.preprocessing),
        of_data=True,
        task=make_task(found.task, len(found.classes)),
        arguments=content["arguments"],
    )
