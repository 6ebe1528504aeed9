"""The dense blocks of a network as sizes, and the shapes that its kernels are timed on."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.networks import KNOWN_NETWORKS, NetworkSpec

CONVOLUTIONS = (
    "conv1x1_forward",
    "conv1x1_backward",
    "conv3x3_forward",
    "conv3x3_backward",
    "transition_forward",
    "transition_backward",
)
MEMORY_BOUND = (
    "channel_statistics",
    "finish_gradient",
    "norm_relu_maxpool_forward",
    "norm_relu_maxpool_backward",
)
# Channels that one layer of each block reads, about its middle one; others: exactly the middle one.
LAYER_CHANNELS = {"densenet121": (128, 320, 640, 768), "densenet-bc-100": (120, 200, 250)}


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


@dataclass(frozen=True)
class Shape:
    """Images of one size and the channels of one kernel."""

    images: int
    size: int  # pixels, in every dimension
    dims: int
    channels: int  # that the kernel reads
    outputs: int  # of its product; 0: it has none
    buffer: int  # of all features of the block, in which the kernel's are a slice

    @property
    def rows(self) -> int:
        """Pixels of the batch."""
        return self.images * self.size**self.dims

    @property
    def label(self) -> str:
        """As tables show it."""
        label = "×".join(map(str, (self.images, *(self.size,) * self.dims, self.channels)))
        return f"{label} → {self.outputs}" if self.outputs else label


def shapes(kernel: str, name: str) -> list[Shape]:
    """Where one network has this kernel: for each block that has it, or in its stem."""
    spec = KNOWN_NETWORKS[name]
    inner = blocks(spec)
    stem: list[Shape] = []
    if not spec.small_inputs:
        channels, size = spec.num_init_features, (spec.image_size - 1) // 2 + 1
        stem = [Shape(spec.batch_size, size, spec.dims, channels, 0, channels)]
    if kernel.startswith("norm_relu_maxpool"):
        return stem
    if kernel == "channel_statistics":
        return [*stem, *(_shape(block, block.channels) for block in inner)]
    if kernel == "finish_gradient":
        return [_shape(block, block.growth) for block in inner]
    middles = [block.start(block.layers // 2) for block in inner]
    if kernel.startswith("conv3x3"):
        reads = [block.bottleneck for block in inner] if spec.bottleneck else middles
        return [_shape(block, read, block.growth) for block, read in zip(inner, reads, strict=True)]
    if kernel.startswith("conv1x1") and not spec.bottleneck:
        return []
    if kernel.startswith("transition"):
        return [_shape(block, block.end, block.transition) for block in inner if block.transition]
    layers = LAYER_CHANNELS.get(name) or middles
    return [
        _shape(block, channels, block.bottleneck)
        for block, channels in zip(inner, layers, strict=True)
    ]


def _shape(block: Block, channels: int, outputs: int = 0) -> Shape:
    return Shape(block.images, block.size, block.dims, channels, outputs, block.end)
