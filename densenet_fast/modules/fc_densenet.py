"""FC-DenseNet, the DenseNet for semantic segmentation, in less memory.

Annotations are types here, not strings, for torch.fx and torch.jit.script (see `layers`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from densenet_fast import arguments
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.memory_plan import NetworkSize
from densenet_fast.modules import dimensions, eligibility, fusing, input_checks, layer_parts
from densenet_fast.modules.eligibility import Expected, named, routed
from densenet_fast.modules.kept_plans import kept
from densenet_fast.modules.layers import DenseBlock, Transition
from densenet_fast.modules.step_sizes import segmentation_size
from densenet_fast.modules.steps import MaxTransitionStep, Step
from densenet_fast.weights.load import LoadedWhole


class TransitionDown(Transition):
    """norm, ReLU, 1×1 convolution of as many channels, dropout and 2×2 max-pooling.

    [N, C, H, W] to [N, C, H // 2, W // 2], and likewise in one and three dimensions.
    """

    def __init__(self, num_features: int, drop_rate: float, *, spatial_dims: int = 2) -> None:
        super().__init__(num_features, num_features, spatial_dims=spatial_dims)
        del self.pool
        maximum = dimensions.modules(spatial_dims).maximum(kernel_size=2, stride=2)
        self.drop = nn.Dropout(arguments.share("drop_rate", drop_rate, zero=True))
        self.add_module("pool", maximum)

    def step(
        self, obstacle: str | None, channels: int | None, expected: Expected
    ) -> MaxTransitionStep | str:
        """The transition by itself: the block before it keeps its features, for the way up."""
        if obstacle is not None:
            return obstacle
        parts: Any = self._modules
        if list(parts) != ["norm", "relu", "conv", "drop", "pool"]:
            return f"its submodules are {', '.join(parts)}"
        norm, relu, conv, drop, pool = parts.values()
        found = layer_parts.transition_obstacle(norm, conv, channels, expected)
        found = found or named("relu", eligibility.exactly(relu, nn.ReLU))
        found = found or named("drop", eligibility.exactly(drop, nn.Dropout))
        found = found or named("pool", eligibility.max_pool(pool, 2, expected.dims))
        return found or MaxTransitionStep(norm, conv, drop.p if drop.training else 0.0)


eligibility.KINDS[TransitionDown] = "transition"


class TransitionUp(nn.Module):
    """3×3 transposed convolution of stride 2 of a block's new features, and a skip connection."""

    __constants__ = ("num_features", "spatial_dims")

    def __init__(self, num_features: int, *, spatial_dims: int = 2) -> None:
        super().__init__()
        self.num_features, self.spatial_dims = num_features, spatial_dims
        transposed = dimensions.modules(spatial_dims).transposed
        self.conv = transposed(num_features, num_features, kernel_size=3, stride=2)

    def forward(self, input: Tensor, skip: Tensor) -> Tensor:
        """[N, C, *size], of which the last `num_features` are new, to those and the skip's.

        The skip is [N, C', *size'] with `size'` up to one more than twice `size`, to which the
        output is cut.
        """
        upsampled = self.conv(input[:, -self.num_features :])
        for axis in range(2, 2 + self.spatial_dims):
            upsampled = upsampled.narrow(axis, 0, skip.shape[axis])
        return torch.cat((upsampled, skip), 1)


class FCDenseNet(LoadedWhole):
    """Fully convolutional DenseNet for semantic segmentation (arXiv 1611.09326), exact.

    A path of dense blocks and transitions down, a dense block, and a path up, on which every block
    reads the upsampled new features of the one before and the features of the block of the same
    size on the way down. Layers are norm, ReLU, 3×3 convolution and dropout. There are no modes of
    checkpointing to choose from: the blocks keep their features, which others read, and nothing
    besides.

    Args:
        num_classes: classes of a pixel.
        growth_rate: channels that every layer adds (k in the paper).
        down_blocks: layers of every block on the way down.
        bottleneck_layers: layers of the block between the paths.
        up_blocks: layers of every block on the way up: as many blocks as on the way down.
        num_init_features: channels of the first convolution.
        drop_rate: dropout probability behind every layer and in every transition down.
        in_channels: channels of the images.
        spatial_dims: the images' dimensions: 1, 2 or 3.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self,
        num_classes: int,
        growth_rate: int = 16,
        down_blocks: tuple[int, ...] = (4, 5, 7, 10, 12),
        bottleneck_layers: int = 15,
        up_blocks: tuple[int, ...] = (12, 10, 7, 5, 4),
        num_init_features: int = 48,
        drop_rate: float = 0.2,
        *,
        in_channels: int = 3,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        kinds = dimensions.modules(spatial_dims)
        self.spatial_dims = int(spatial_dims)
        num_classes = arguments.integer("num_classes", num_classes)
        growth_rate = arguments.integer("growth_rate", growth_rate)
        down = arguments.layer_counts("down_blocks", down_blocks)
        up = arguments.layer_counts("up_blocks", up_blocks)
        if len(up) != len(down):
            raise ValueError(
                f"up_blocks must have as many blocks as down_blocks, {len(down)}, got {len(up)}"
            )
        middle = arguments.integer("bottleneck_layers", bottleneck_layers)
        channels = arguments.integer("num_init_features", num_init_features)
        drop_rate = arguments.share("drop_rate", drop_rate, zero=True)
        in_channels = arguments.integer("in_channels", in_channels)

        def block(layers: int, channels: int) -> DenseBlock:
            return DenseBlock(
                layers,
                channels,
                1,
                growth_rate,
                drop_rate,
                spatial_dims=spatial_dims,
                bottleneck=False,
            )

        self.conv0 = kinds.conv(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        skips: list[int] = []
        for layers in down:
            self.down_blocks.append(block(layers, channels))
            channels += layers * growth_rate
            skips.append(channels)
            self.transitions_down.append(
                TransitionDown(channels, drop_rate, spatial_dims=spatial_dims)
            )
        self.bottleneck = block(middle, channels)
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        new = middle * growth_rate
        for layers, skip in zip(up, reversed(skips), strict=True):
            self.transitions_up.append(TransitionUp(new, spatial_dims=spatial_dims))
            self.up_blocks.append(block(layers, new + skip))
            channels = new + skip + layers * growth_rate
            new = layers * growth_rate
        self.classifier = kinds.conv(channels, num_classes, kernel_size=1)

        for module in self.modules():
            if isinstance(module, (kinds.conv, kinds.transposed)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes, *size] of the pixels of images [N, in_channels, *size]."""
        if is_scripting():
            return self.plain(x)
        else:  # noqa: RET505 (what TorchScript does not compile)
            return routed(self, x, self.plain)

    def plain(self, x: Tensor) -> Tensor:
        """The modules called one by one."""
        x = self.conv0(x)
        skips: list[Tensor] = []
        for block, transition in zip(self.down_blocks, self.transitions_down):  # noqa: B905
            x = block(x)
            skips.append(x)
            x = transition(x)
        x = self.bottleneck(x)
        for up, block in zip(self.transitions_up, self.up_blocks):  # noqa: B905
            x = block(up(x, skips.pop()))
        return self.classifier(x)

    def run(self, x: Tensor) -> Tensor:
        """The checked forward, fused where nothing is in the way."""
        input_checks.images(self, x)
        synchronized.check_modules(self, x.device)
        input_checks.chain(type(self).__name__, self.to_smallest(), x)
        input_checks.parameters(self, self, x)
        if eligibility.input(x) is not None:
            return self.plain(x)
        expected = eligibility.expected(x)

        def call(input: Tensor, *modules: nn.Module) -> Tensor:
            """As calling them, but that nobody gets a copy of a block's features."""
            return fusing.run(self._steps(modules, expected), input, hold=False)

        skips: list[Tensor] = []
        stem: tuple[nn.Module, ...] = (self.conv0,)
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            skips.append(call(x, *stem, block))
            x = call(skips[-1], transition)
            stem = ()
        x = call(x, self.bottleneck)
        for up, block in zip(self.transitions_up, self.up_blocks, strict=True):
            given = x, skips.pop()
            if eligibility.exactly(up, TransitionUp) is not None:
                # Others' code may write to what it gets: never a feature buffer.
                given = given[0].clone(), given[1].clone()
            x = call(up(*given), block)
        return call(x, self.classifier)

    def _steps(self, modules: Sequence[nn.Module], expected: Expected) -> Sequence[Step]:
        """The steps of modules that are called one after another."""

        def make() -> Sequence[Step]:
            return fusing.steps(modules, expected, head=None)[0]

        return kept(self, (expected, *map(id, modules)), make)

    def to_smallest(self) -> list[nn.Module]:
        """The modules that the smallest features come from."""
        pairs = zip(self.down_blocks, self.transitions_down, strict=True)
        return [self.conv0, *(module for pair in pairs for module in pair), self.bottleneck]

    def step_size(
        self,
        shape: Sequence[int],
        stored: torch.dtype,
        expected: Expected,
        *,
        recompute: bool,
    ) -> NetworkSize | None:
        """Sizes of a training step on images of `shape`, if all of it is fused.

        There is nothing in front of the blocks to `recompute`.
        """
        if eligibility.any_conv(self.classifier) is not None:
            return None
        transposed = dimensions.MODULES[expected.dims].transposed
        up: list[tuple[Any, Step]] = []
        for upsampling, block in zip(self.transitions_up, self.up_blocks, strict=True):
            if eligibility.exactly(upsampling, TransitionUp) is not None:
                return None
            conv: Any = upsampling.conv
            if eligibility.exactly(conv, transposed) is not None:
                return None
            up.append((conv, self._steps([block], expected)[0]))
        down = self._steps(self.to_smallest(), expected)
        return segmentation_size(down, up, self.classifier, shape, stored, expected.device)


def fcdensenet56(num_classes: int, **kwargs: Any) -> FCDenseNet:
    """FC-DenseNet56 of the paper: growth 12, four layers in every block.

    `kwargs` are those of `FCDenseNet`.
    """
    return FCDenseNet(num_classes, **{**_of_equal_blocks(12, 4), **kwargs})


def fcdensenet67(num_classes: int, **kwargs: Any) -> FCDenseNet:
    """FC-DenseNet67 of the paper: growth 16, five layers in every block."""
    return FCDenseNet(num_classes, **{**_of_equal_blocks(16, 5), **kwargs})


def fcdensenet103(num_classes: int, **kwargs: Any) -> FCDenseNet:
    """FC-DenseNet103 of the paper, which is what `FCDenseNet` is by default."""
    return FCDenseNet(num_classes, **kwargs)


def _of_equal_blocks(growth_rate: int, layers: int) -> dict[str, Any]:
    path = (layers,) * 5
    return {
        "growth_rate": growth_rate,
        "down_blocks": path,
        "bottleneck_layers": layers,
        "up_blocks": path,
    }
