"""A network as sizes: its blocks, and the elements of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from benchmarks.networks import NetworkSpec
from densenet_fast.blocks.memory_plan import (
    BlockSize,
    HeadSize,
    NetworkSize,
    Plan,
    StemSize,
    held_below_peak,
    statistics_bytes,
)
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.operators.rows import row_pitch

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Format:
    """How numbers are stored. Parameters are float32; statistics and sums always are."""

    name: str
    label: str
    element: int  # bytes of a feature
    tensor: str  # which tensor-core rate products run at: "half" or "tf32"
    parameter: int = 4  # bytes

    @property
    def casts(self) -> bool:
        """Whether autocast rounds weights and images."""
        return self.element != self.parameter


FORMATS: dict[str, Format] = {
    "bfloat16": Format(
        "bfloat16", "bfloat16 features as under autocast, float32 parameters", 2, "half"
    ),
    "float32": Format("float32", "float32 features and parameters, tf32 products", 4, "tf32"),
}


@dataclass(frozen=True)
class Op:
    """One operation of a step: bytes read from and written to memory, FLOPs of its product."""

    name: str
    phase: Phase
    read: int
    written: int
    flops: int = 0
    launches: int = 1  # kernels started
    ours: bool = False  # a product of the CUDA kernels in csrc/cuda
    # Bytes among the above that an L2 cache may hold: partial results, rearranged weights and
    # further sweeps over an operand.
    repeated: int = 0

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written


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
    def rows(self) -> int:
        """Pixels of the batch."""
        return self.images * self.size**self.dims

    @property
    def pooled_rows(self) -> int:
        """Pixels behind the 2-wide pooling."""
        return self.images * (self.size // 2) ** self.dims

    @property
    def taps(self) -> int:
        """Of the 3-wide convolution."""
        return 3**self.dims

    @property
    def end(self) -> int:
        """Channels of all features."""
        return self.start(self.layers)

    def start(self, layer: int) -> int:
        """Channels that a layer reads."""
        return self.channels + layer * self.growth

    @property
    def starts(self) -> Iterable[int]:
        """Channels that each layer reads."""
        return [self.start(layer) for layer in range(self.layers)]

    def layer_weights(self, layer: int) -> int:
        """Elements of a layer's two convolutions."""
        return self.bottleneck * (self.start(layer) + self.taps * self.growth)

    @property
    def weights(self) -> int:
        """Elements of all convolutions, the transition's included."""
        layers = sum(self.layer_weights(layer) for layer in range(self.layers))
        return layers + self.end * (self.transition or 0)

    @property
    def affine(self) -> int:
        """Elements of all norms' weights and biases."""
        return 2 * (sum(self.starts) + self.layers * self.bottleneck + self.end)


@dataclass(frozen=True)
class Stem:
    """The first convolution and, but for small inputs, norm, ReLU and max-pooling."""

    images: int
    image_elements: int
    rows: int  # pixels of the convolution's output
    channels: int
    weights: int
    pooled_rows: int  # 0: no norm and no pooling

    @property
    def flops(self) -> int:
        """Of the convolution's forward."""
        return 2 * self.rows * self.weights


def stem(spec: NetworkSpec) -> Stem:
    """The stem's sizes."""
    images, size = spec.batch_size, spec.image_size
    out = size if spec.small_inputs else (size - 1) // 2 + 1
    pooled = 0 if spec.small_inputs else (out - 1) // 2 + 1
    taps = (3 if spec.small_inputs else 7) ** spec.dims
    return Stem(
        images=images,
        image_elements=images * spec.in_channels * size**spec.dims,
        rows=images * out**spec.dims,
        channels=spec.num_init_features,
        weights=taps * spec.in_channels * spec.num_init_features,
        pooled_rows=images * pooled**spec.dims,
    )


def blocks(spec: NetworkSpec) -> list[Block]:
    """The dense blocks' sizes."""
    size = spec.image_size
    if not spec.small_inputs:
        size = ((size - 1) // 2) // 2 + 1
    channels = spec.num_init_features
    found = []
    for index, layers in enumerate(spec.block_config, start=1):
        end = channels + layers * spec.growth_rate
        last = index == len(spec.block_config)
        behind = None if last else int(end * spec.compression)
        growth, width = spec.growth_rate, spec.bn_size * spec.growth_rate
        images = spec.batch_size
        found.append(Block(images, size, spec.dims, channels, layers, growth, width, behind))
        channels, size = behind or end, size // 2
    return found


LABEL = 8  # bytes of one
LOSS_WEIGHT = 4  # bytes: the scalar that nll_loss keeps


def head_kept(spec: NetworkSpec, fmt: Format) -> int:
    """Classifier's input, labels, log-probabilities, and the weight that autocast rounded."""
    n, c = spec.batch_size, blocks(spec)[-1].end
    rounded = c * spec.num_classes * fmt.element if fmt.casts else 0
    loss = n * (spec.num_classes * fmt.parameter + LABEL) + LOSS_WEIGHT
    return n * c * fmt.element + loss + rounded


def fused_network(spec: NetworkSpec, fmt: Format, *, cuda: bool = True) -> NetworkSize:
    """The network as densenet_fast runs it.

    The parameters have gradients before the step, as in all predictions of memory.
    """
    s = stem(spec)
    pooled = s.pooled_rows * s.channels
    first = StemSize(
        features=s.rows * s.channels * fmt.element if pooled else 0,
        pooled=pooled * fmt.element,
        positions=pooled,
        statistics=statistics_bytes(s.channels, fmt.element) if pooled else 0,
        copies=(s.image_elements + s.weights) * fmt.element * fmt.casts,
        recomputable=pooled > 0,
        weights=s.weights * fmt.parameter,
    )
    sizes = [
        BlockSize(
            pixels=block.rows,
            channels=block.channels,
            end=block.end,
            widths=[block.bottleneck] * block.layers,
            growth=block.growth,
            output=(
                block.images * block.end
                if block.transition is None
                else block.pooled_rows * block.transition
            ),
            itemsize=fmt.element,
            weights=block.weights * fmt.parameter,
            lasting=0,
            pitch=row_pitch(block.end, fmt.element, cuda=cuda),
        )
        for block in blocks(spec)
    ]
    classifier = sizes[-1].end * spec.num_classes * fmt.parameter
    return NetworkSize(first, sizes, HeadSize(head_kept(spec, fmt), classifier))


def plans(network: NetworkSize, mode: Checkpoint) -> list[Plan]:
    """How each block runs if all of them are in this mode."""
    return held_below_peak(network, [mode] * len(network.blocks))


def parameters(spec: NetworkSpec) -> int:
    """Elements of all parameters."""
    first, inner = stem(spec), blocks(spec)
    norm0 = 2 * first.channels if first.pooled_rows else 0
    classifier = (inner[-1].end + 1) * spec.num_classes
    return first.weights + norm0 + sum(b.weights + b.affine for b in inner) + classifier
