"""From an image to the network's input: with augmentation in training, without it elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchvision.transforms import v2

from densenet_fast.train.errors import UsageError

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

    `resize` is the shorter edge, None for none; `crop` cuts a square from the centre. `mean` and
    `std` have one value per channel, of pixels from 0 to 1.
    """

    resize: int | None
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> Transform:
        """From a PIL image or an unsigned byte tensor to float32 [C, crop, crop]."""
        channels = v2.Grayscale() if len(self.mean) == 1 else v2.RGB()
        resize = [] if self.resize is None else [v2.Resize(self.resize, antialias=True)]
        return v2.Compose(
            [v2.ToImage(), channels, *resize, v2.CenterCrop(self.crop), *_normalized(self)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _normalized(preprocessing: Preprocessing) -> list[torch.nn.Module]:
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
        v2.ToPureTensor(),
    ]


def preprocessing(
    size: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    resize: int | None = None,
    crop: int | None = None,
) -> Preprocessing:
    """For images of that size: as they are, or ImageNet's 224 from 256 where sizes vary.

    Raises:
        UsageError: the crop is larger than what is resized to.
    """
    if size is None:
        crop = crop or 224
        resize = resize or max(256, crop)
    else:
        crop = crop or resize or size
        resize = resize or (None if crop == size else crop)
    if crop > (resize or crop):
        raise UsageError(
            f"--val-crop-size {crop} is above --val-resize-size {resize}: nothing to cut it from"
        )
    return Preprocessing(resize, crop, mean, std)


def training_transform(
    plain: Preprocessing,
    size: int | None,
    *,
    crop: int,
    flip: bool,
    policy: str | None,
    erase: float,
) -> Transform:
    """Random crops of `crop` pixels, then what the arguments ask for.

    Images of one small size are shifted by up to an eighth of it, others cut and scaled at random.
    """
    steps: list[torch.nn.Module] = [v2.ToImage()]
    steps.append(v2.Grayscale() if len(plain.mean) == 1 else v2.RGB())
    if size is None:
        steps.append(v2.RandomResizedCrop(crop, antialias=True))
    else:
        if crop != size:
            steps.append(v2.Resize((crop, crop), antialias=True))
        steps.append(v2.RandomCrop(crop, padding=crop // 8))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if policy is not None:
        steps.append(POLICIES[policy]())
    steps.extend(_normalized(plain))
    if erase > 0:
        steps.append(v2.RandomErasing(erase))
    return v2.Compose(steps)
