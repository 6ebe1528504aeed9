"""The dense blocks of a network as sizes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.networks import NetworkSpec


@dataclass(frozen=True)
class Block:
    """A dense block on images of one size in every dimension, and what is behind it."""

    images: int
    size: int
    dims: int
    channels: int  # of the input
    layers: int
    growth: int
    bottleneck: int
    transition: int | None  # channels behind the transition; None: the final norm follows

    @property
    def end(self) -> int:
        """Channels of all features."""
        return self.start(self.layers)

    def start(self, layer: int) -> int:
        """Channels that a layer reads."""
        return self.channels + layer * self.growth


def blocks(spec: NetworkSpec) -> list[Block]:
    """The dense blocks of a network."""
    size = spec.image_size
    if not spec.small_inputs:
        size = ((size - 1) // 2) // 2 + 1
    channels, growth, found = spec.num_init_features, spec.growth_rate, []
    for index, layers in enumerate(spec.block_config, start=1):
        end = channels + layers * growth
        last = index == len(spec.block_config)
        behind = None if last else int(end * spec.compression)
        shape = (spec.batch_size, size, spec.dims)
        found.append(Block(*shape, channels, layers, growth, spec.bn_size * growth, behind))
        channels, size = behind or end, size // 2
    return found
