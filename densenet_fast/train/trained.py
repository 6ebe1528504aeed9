"""A trained network for `evaluate` and `predict`: from a checkpoint, or ImageNet's by name."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

import torch

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train import checkpoints
from densenet_fast.train.architecture import IMAGENET_CLASSES, Architecture
from densenet_fast.train.errors import UsageError
from densenet_fast.train.loading import built
from densenet_fast.train.networks import pretrained
from densenet_fast.train.sources import IMAGENET_MEAN, IMAGENET_STD
from densenet_fast.train.transforms import Preprocessing, preprocessing


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode, with what its inputs and outputs mean."""

    model: EfficientDenseNet
    classes: tuple[str, ...]
    plain: Preprocessing
    of_data: bool  # whether data have these very classes; ImageNet's folders have other names

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
    return replace(found, plain=_resized(found.plain, arguments))


def _imagenet(arguments: Namespace) -> Trained:
    from torchvision.models import get_model_weights

    architecture = Architecture(arguments.model, IMAGENET_CLASSES, 3)
    model = pretrained(architecture, arguments.weights, exact=True)
    weights = next(iter(get_model_weights("densenet121")))
    plain = preprocessing(None, IMAGENET_MEAN, IMAGENET_STD)
    return Trained(model, tuple(weights.meta["categories"]), plain, of_data=False)


def _from_checkpoint(arguments: Namespace) -> Trained:
    content = checkpoints.read(arguments.checkpoint)
    if arguments.no_ema and content["ema"] is None:
        raise UsageError(f"--no-ema: {arguments.checkpoint} was trained without --model-ema")
    found = built(content, ema=not arguments.no_ema)
    plain = Preprocessing(**found.preprocessing)
    return Trained(found.model, found.classes, plain, of_data=True)


def _resized(plain: Preprocessing, arguments: Namespace) -> Preprocessing:
    """With the sizes of the arguments, where they have any."""
    resize, crop = arguments.val_resize_size, arguments.val_crop_size
    if resize is None and crop is None:
        return plain
    return preprocessing(
        None,
        plain.mean,
        plain.std,
        resize=resize or plain.resize or crop,
        crop=crop or min(plain.crop, resize),
    )
