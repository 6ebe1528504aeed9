"""The networks that are measured, as data: every peer is built from the same `NetworkSpec`."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any


@dataclass(frozen=True)
class NetworkSpec:
    """A DenseNet-BC and the input it is measured with."""

    name: str
    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int
    image_size: int  # pixels, in every dimension
    batch_size: int  # images
    bn_size: int = 4
    bottleneck: bool = True
    num_classes: int = 1000
    in_channels: int = 3
    small_inputs: bool = False  # 3×3 stem without norm and pooling
    compression: float = 0.5
    dims: int = 2  # of the images
    segmentation: bool = False  # FC-DenseNet: the middle block is the one between its two paths
    drop_rate: float = 0.0

    @property
    def paths(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """Layers of the blocks of an FC-DenseNet: on the way down, between the paths, and up."""
        half = len(self.block_config) // 2
        return self.block_config[:half], self.block_config[half], self.block_config[half + 1 :]

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of a batch's labels: one for each image, or each pixel."""
        size = self.input_shape[2:] if self.segmentation else ()
        return (self.batch_size, *size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one batch, [N, C, H, W]."""
        return (self.batch_size, self.in_channels, *(self.image_size,) * self.dims)

    @property
    def title(self) -> str:
        """Name and input, as tables show them."""
        return f"{self.name} (k={self.growth_rate}), {'×'.join(map(str, self.input_shape))}"

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` turns back into this specification."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NetworkSpec:
        """Inverse of `to_json`."""
        return cls(**{**data, "block_config": tuple(data["block_config"])})


def densenet_bc(
    depth: int,
    growth_rate: int,
    *,
    batch_size: int,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
    dims: int = 2,
) -> NetworkSpec:
    """DenseNet-BC for small images: three equal blocks, `depth` layers, 2k stem channels.

    Of sequences and volumes MONAI's, with the large stem.
    """
    layers, rest = divmod(depth - 4, 6)
    if layers < 1 or rest:
        raise ValueError(
            f"the depth of a DenseNet-BC of three blocks is 6·n + 4 (10, 16, ...), got {depth}"
        )
    return NetworkSpec(
        name=f"DenseNet-BC-{depth}" + f", {dims}-D" * (dims != 2),
        growth_rate=growth_rate,
        block_config=(layers,) * 3,
        num_init_features=2 * growth_rate,
        image_size=image_size,
        batch_size=batch_size,
        num_classes=num_classes,
        in_channels=in_channels,
        small_inputs=dims == 2,
        dims=dims,
    )


def imagenet(depth: int, growth_rate: int, block_config: tuple[int, ...]) -> NetworkSpec:
    """DenseNet for 224×224 images, 2k stem channels."""
    return NetworkSpec(
        name=f"DenseNet-{depth}",
        growth_rate=growth_rate,
        block_config=block_config,
        num_init_features=2 * growth_rate,
        image_size=224,
        batch_size=8,
    )


NETWORKS: dict[str, NetworkSpec] = {
    "densenet121": imagenet(121, 32, (6, 12, 24, 16)),
    "densenet161": imagenet(161, 48, (6, 12, 36, 24)),
    "densenet169": imagenet(169, 32, (6, 12, 32, 32)),
    "densenet201": imagenet(201, 32, (6, 12, 48, 32)),
    "densenet264": imagenet(264, 32, (6, 12, 64, 48)),
    "densenet-bc-100": densenet_bc(100, 12, batch_size=64),
    "densenet-bc-190": densenet_bc(190, 40, batch_size=4),
}
_sequences_or_volumes = partial(replace, NETWORKS["densenet121"], in_channels=1, num_classes=2)
# Of sequences and volumes, where the naive network is MONAI's, and without bottlenecks and
# compression, as in the first lines of the paper's table; and for segmentation.
OTHER_NETWORKS: dict[str, NetworkSpec] = {
    "densenet121-1d": _sequences_or_volumes(
        name="DenseNet-121, 1-D", dims=1, image_size=2048, batch_size=32
    ),
    "densenet121-3d": _sequences_or_volumes(
        name="DenseNet-121, 3-D", dims=3, image_size=64, batch_size=2
    ),
    "densenet121-3d-96": _sequences_or_volumes(
        name="DenseNet-121, 3-D", dims=3, image_size=96, batch_size=1
    ),
    "densenet-100": replace(
        NETWORKS["densenet-bc-100"],
        name="DenseNet-100 without B and C",
        block_config=(32, 32, 32),
        num_init_features=16,
        bottleneck=False,
        compression=1.0,
    ),
    "fcdensenet-103": NetworkSpec(
        name="FC-DenseNet103",
        growth_rate=16,
        block_config=(4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
        num_init_features=48,
        image_size=224,
        batch_size=2,
        bottleneck=False,
        num_classes=11,
        segmentation=True,
        drop_rate=0.2,
    ),
    "densenet-bc-100-3d": densenet_bc(100, 12, batch_size=8, in_channels=1, num_classes=2, dims=3),
}
KNOWN_NETWORKS = ChainMap(OTHER_NETWORKS, NETWORKS)  # the last one first
# The two that suites measure unless told otherwise.
MAIN_NETWORKS = ("densenet121", "densenet-bc-100")
