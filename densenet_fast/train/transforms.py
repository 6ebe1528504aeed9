"""From an image to the network's input: with augmentation in training, without it elsewhere."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from densenet_fast.train.entries import INTERPOLATIONS
from densenet_fast.train.errors import UsageError

CROP = 224  # of photographs, by default
SCALE = (0.08, 1.0)  # torchvision's, of the area
RATIO = (3 / 4, 4 / 3)  # the same, of width / height
Transform = Callable[[Any], torch.Tensor]

POLICIES: Mapping[str, Callable[[], torch.nn.Module]] = {
    "imagenet": v2.AutoAugment,
    "ra": v2.RandAugment,
    "ta_wide": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs when nothing is random; plain data, as checkpoints hold it.

    `resize` is the shorter edge, None for none, by `interpolation`; `crop` cuts a square from the
    centre. `mean` and `std` have one value per channel, of pixels from 0 to 1.
    """

    resize: int | None
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = INTERPOLATIONS[0]

    def transform(self) -> Transform:
        """From a PIL image, or a tensor of bytes or of numbers from 0 to 1, to [C, crop, crop]."""
        steps = [*self.first(), v2.CenterCrop(self.crop), *self.last()]
        if self.resize is not None:
            steps.insert(2, self.resized(self.resize))
        return v2.Compose(steps)

    def first(self) -> list[torch.nn.Module]:
        """What makes a tensor of the right channels."""
        return [v2.ToImage(), v2.Grayscale() if len(self.mean) == 1 else v2.RGB()]

    def resized(self, size: int | tuple[int, int]) -> torch.nn.Module:
        """To a shorter edge, or to height and width."""
        return v2.Resize(size, InterpolationMode(self.interpolation), antialias=True)

    def last(self) -> list[torch.nn.Module]:
        """What makes normalized numbers."""
        return [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def preprocessing(
    size: int | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> Preprocessing:
    """For images of that size as they are, or ImageNet's 224 from 256 where sizes vary."""
    return Preprocessing(256 if size is None else None, size or CROP, mean, std)


def with_sizes(plain: Preprocessing, arguments: Namespace) -> Preprocessing:
    """With the sizes and the interpolation that flags ask for, where they do.

    Raises:
        UsageError: the crop is larger than what is resized to, or that is given twice.
    """
    resize, crop, crop_pct = (
        getattr(arguments, name) for name in ("val_resize_size", "val_crop_size", "crop_pct")
    )
    plain = replace(plain, interpolation=arguments.interpolation or plain.interpolation)
    if crop_pct is not None:
        if resize is not None:
            raise UsageError(
                f"--crop-pct {crop_pct:g} and --val-resize-size {resize} say the same: give one"
            )
        crop = crop or plain.crop
        return replace(plain, resize=math.floor(crop / crop_pct), crop=crop)
    if crop is None:
        crop = resize or plain.crop
        if plain.resize is not None:
            crop = min(crop, plain.crop)
    if resize is None:
        resize = max(plain.resize, crop) if plain.resize else None if crop == plain.crop else crop
    if crop > (resize or crop):
        raise UsageError(
            f"--val-crop-size {crop} is above --val-resize-size {resize}: nothing to cut it from"
        )
    return replace(plain, resize=resize, crop=crop)


@dataclass(frozen=True)
class Augmentation:
    """What is random in training, in this order.

    `scale` are the least and the largest share of an image's area that is cut out, with a width /
    height within `ratio`, and resized to `crop` pixels; None: the whole image, shifted by up to an
    eighth. `hflip`, `vflip` and `erase`
    are probabilities, `jitter` is how much brightness, contrast and saturation vary.
    """

    crop: int
    scale: tuple[float, float] | None
    hflip: float = 0.0
    vflip: float = 0.0
    jitter: float = 0.0
    policy: str | None = None
    erase: float = 0.0
    ratio: tuple[float, float] = RATIO

    def transform(self, plain: Preprocessing, size: int | None) -> Transform:
        """From an image, of that size if all have one, to the network's input."""
        mode = InterpolationMode(plain.interpolation)
        steps = plain.first()
        if self.scale is not None:
            steps.append(v2.RandomResizedCrop(self.crop, self.scale, self.ratio, mode))
        else:
            if self.crop != size:
                steps.append(plain.resized((self.crop, self.crop)))
            steps.append(v2.RandomCrop(self.crop, padding=self.crop // 8, pad_if_needed=True))
        if self.hflip > 0:
            steps.append(v2.RandomHorizontalFlip(self.hflip))
        if self.vflip > 0:
            steps.append(v2.RandomVerticalFlip(self.vflip))
        if self.jitter > 0:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        if self.policy is not None:
            steps.append(POLICIES[self.policy]())
        steps.extend(plain.last())
        if self.erase > 0:
            steps.append(v2.RandomErasing(self.erase))
        return v2.Compose(steps)
