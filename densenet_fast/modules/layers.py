"""Dense layers, blocks and transitions with torchvision's names, fused wherever that is exact.

Annotations are types here, not strings: torch.fx writes those of a forward into its code, which
torch.jit.script reads. Class bodies have none of submodules, as torch.jit.script takes them for
its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from densenet_fast import arguments
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.dense_block import released
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.modules import dimensions, eligibility, input_checks, layer_parts
from densenet_fast.modules.eligibility import Expected, named, routed
from densenet_fast.modules.layer_parts import LayerParts, TailParts
from densenet_fast.modules.steps import DenseStep, MaxTransitionStep, Segment


class FusedModule(nn.Module):
    """A module that runs as one step wherever nothing is in the way."""

    def forward(self, input: Tensor) -> Tensor:
        """The output of `input` [N, C, *size]."""
        if is_scripting():
            return self.plain(input)
        else:  # noqa: RET505 (what TorchScript does not compile)
            return routed(self, input, self.plain)

    def run(self, input: Tensor) -> Tensor:
        """The checked forward, fused where nothing is in the way."""
        owner = type(self).__name__
        input_checks.images(self, input)
        input_checks.channels(owner, input, self.first_reader())
        synchronized.check_modules(self, input.device)
        step = self.step(eligibility.input(input), input.shape[1], eligibility.expected(input))
        if isinstance(step, str) or (isinstance(step, DenseStep) and not step.fused_throughout):
            input_checks.parameters(self, self, input)
        chain = self if isinstance(self, Transition) else [self]
        input_checks.chain(owner, chain, input)
        if isinstance(step, str):
            return self.plain(input)
        memory_format = self.released_format(input)
        if isinstance(step, DenseStep):
            step.memory_format = memory_format
        return released(step.run(input), memory_format)

    def step(
        self, obstacle: str | None, channels: int | None, expected: Expected
    ) -> DenseStep | MaxTransitionStep | str:
        """The step on so many channels (None: any number), or why there is none.

        `obstacle` is one that lies outside.
        """
        raise NotImplementedError

    def plain(self, input: Tensor) -> Tensor:
        """The forward without anything fused."""
        raise NotImplementedError

    def first_reader(self) -> nn.Module | None:
        """The module that decides how many channels are expected, if one does."""
        return next(iter(self._modules.values()), None)

    def released_format(self, input: Tensor) -> torch.memory_format:
        """What others' code gets features in: as they are, if they are to stay channels last."""
        return torch.preserve_format


class Checkpointed(FusedModule):
    """A layer or block, of which a mode says what is kept for the backward."""

    __jit_unused_properties__ = ("checkpoint",)
    __jit_ignored_attributes__ = ("_checkpoint",)
    _checkpoint: Checkpoint

    @property
    def checkpoint(self) -> Checkpoint:
        """What is kept for the backward: "none", "bottleneck" or "block" (see the README)."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, mode: Checkpoint) -> None:
        self._checkpoint = arguments.one_of("checkpoint", mode, CHECKPOINT_MODES)
        for layer in self._modules.values():
            if isinstance(layer, DenseLayer):
                layer.checkpoint = mode

    def _set_mode(self, memory_efficient: bool, checkpoint: Checkpoint) -> None:
        """The mode that a constructor's two arguments mean together."""
        mode = arguments.one_of("checkpoint", checkpoint, CHECKPOINT_MODES)
        kept = arguments.flag("memory_efficient", memory_efficient)
        self._checkpoint = mode if kept else "none"


class DenseLayer(Checkpointed):
    """norm, ReLU, 1×1 convolution, norm, ReLU, 3×3 convolution, concatenated to the input.

    For inputs [N, C, L], [N, C, H, W] or [N, C, D, H, W] by `spatial_dims`.

    Emits its `num_input_features` channels and `k * growth_rate` new ones. The bottleneck between
    the convolutions has `bn_size * growth_rate` channels whatever `k` is. With `bottleneck=False`
    there are norm, ReLU and the 3×3 convolution alone, and `bn_size` means nothing.
    """

    __constants__ = ("bottleneck",)  # TorchScript compiles one of the two forwards
    bottleneck = True  # of layers in files that do not say it

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        k: int = 1,
        memory_efficient: bool = True,
        *,
        checkpoint: Checkpoint = "bottleneck",
        spatial_dims: int = 2,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        kinds = dimensions.modules(spatial_dims)
        num_input_features = arguments.integer("num_input_features", num_input_features)
        growth_rate = arguments.integer("growth_rate", growth_rate)
        width = arguments.integer("bn_size", bn_size) * growth_rate
        growth = arguments.integer("k", k) * growth_rate
        self.bottleneck = arguments.flag("bottleneck", bottleneck)
        self.drop_rate = arguments.share("drop_rate", drop_rate, zero=True)
        self._set_mode(memory_efficient, checkpoint)
        self.norm1 = kinds.norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=False)
        if not self.bottleneck:
            self.conv1 = kinds.conv(
                num_input_features, growth, kernel_size=3, padding=1, bias=False
            )
            return
        self.conv1 = kinds.conv(num_input_features, width, kernel_size=1, bias=False)
        self.norm2 = kinds.norm(width)
        self.relu2 = nn.ReLU(inplace=False)
        self.conv2 = kinds.conv(width, growth, kernel_size=3, padding=1, bias=False)

    def step(
        self, obstacle: str | None, channels: int | None, expected: Expected
    ) -> DenseStep | str:
        """The layer alone."""
        own = _parts(self)
        parts = obstacle or layer_parts.fusable(own, channels, expected)
        return parts if isinstance(parts, str) else DenseStep([[parts]], self._checkpoint)

    def first_reader(self) -> nn.Module | None:
        """The first norm."""
        return self._modules.get("norm1")

    def plain(self, input: Tensor) -> Tensor:
        """The submodules called one by one."""
        # The input is emitted too: what stands for norm1 must not write to it.
        if is_scripting():
            features = input.clone()
        else:
            features = input if eligibility.leaves_input(self.norm1) else input.clone()
        growth = self.conv1(self.relu1(self.norm1(features)))
        if self.bottleneck:
            growth = self.conv2(self.relu2(self.norm2(growth)))
        if self.drop_rate > 0:
            growth = F.dropout(growth, p=self.drop_rate, training=self.training)
        return torch.cat((input, growth), 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The files of torchvision's first pretrained weights say norm.1.weight for norm1.weight.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            kind, _, rest = key[len(prefix) :].partition(".")
            if kind in ("norm", "relu", "conv") and rest[:2] in ("1.", "2."):
                state_dict[f"{prefix}{kind}{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What the submodules' own lines do not say."""
        return f"drop_rate={self.drop_rate}, checkpoint={self._checkpoint!r}"


class FusedBlock(Checkpointed):
    """A module whose children are the layers of a dense block, in order, whatever their types."""

    lists = False  # whether layers take a list of features and return their own alone

    def forward(self, init_features: Tensor) -> Tensor:
        """`init_features` [N, C, *size] and the features of all layers behind them."""
        if is_scripting():
            return self.plain(init_features)
        else:  # noqa: RET505
            return routed(self, init_features, self.plain)

    def layers(self) -> list[nn.Module]:
        """The layers in order, one that is used twice as often."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def first_reader(self) -> nn.Module | None:
        """The first layer's first norm, if that is known."""
        first = next(iter(self.layers()), None)
        parts = "there is none" if first is None else layer_parts.read(first, DenseLayer)
        return None if isinstance(parts, str) else parts.of_features

    def parts(self, expected: Expected) -> list[LayerParts | str]:
        """What each layer computes with, or why it must be called as a module.

        Behind such a one the number of channels is unknown, and taken from the next layer.
        """
        channels: int | None = None
        found: list[LayerParts | str] = []
        for layer in self.layers():
            own = layer_parts.read(layer, DenseLayer)
            parts = layer_parts.fusable(own, channels, expected)
            found.append(parts)
            channels = None if isinstance(parts, str) else parts.emitted
        return found

    def step(self, obstacle: str | None, channels: int | None, expected: Expected) -> DenseStep:
        """Longest runs of layers to fuse, and single layers to call, in order.

        The layers of a run share the features' statistics, so those are of one process group.
        """
        segments: list[Segment] = []
        if obstacle is not None:
            segments.extend(self.layers())
            return DenseStep(segments, self._checkpoint, lists=self.lists)
        run: list[LayerParts] = []
        group = synchronized.OneGroup()
        for layer, parts in zip(self.layers(), self.parts(expected), strict=True):
            if isinstance(parts, str):
                segments.append(layer)
                run = []
                group = synchronized.OneGroup()
            else:
                if not group.admits(parts.of_features):
                    run = []
                    group = synchronized.OneGroup(parts.of_features)
                if not run:
                    segments.append(run)
                run.append(parts)
        return DenseStep(segments, self._checkpoint, lists=self.lists)


class FusedChain(Checkpointed):
    """A module that is nothing but dense layers and transitions, whatever it is written with."""

    def chain(self, expected: Expected) -> list[DenseStep | MaxTransitionStep] | str:
        """Its steps, in order, or why there are none."""
        raise NotImplementedError

    def averages(self) -> bool:
        """Whether there is a transition in it that averages."""
        raise NotImplementedError


class DenseBlock(FusedBlock, nn.ModuleDict):
    """Layers that each read the concatenation of all features so far.

    Any layer may be replaced by a module that takes the features so far and returns them with its
    own behind them. Inputs are [N, C, L], [N, C, H, W] or [N, C, D, H, W] by `spatial_dims`.
    """

    _version = 2

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = True,
        *,
        checkpoint: Checkpoint = "bottleneck",
        spatial_dims: int = 2,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        self._set_mode(memory_efficient, checkpoint)
        num_input_features = arguments.integer("num_input_features", num_input_features)
        growth_rate = arguments.integer("growth_rate", growth_rate)
        for i in range(arguments.integer("num_layers", num_layers)):
            layer = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                checkpoint=self._checkpoint,
                spatial_dims=spatial_dims,
                bottleneck=bottleneck,
            )
            self.add_module(f"denselayer{i + 1}", layer)

    def plain(self, input: Tensor) -> Tensor:
        """The layers called one by one."""
        for layer in self.values():
            input = layer(input)
        return input


class Transition(FusedModule, nn.Sequential):
    """norm, ReLU, 1×1 convolution and 2×2 average pooling between two blocks.

    [N, C, H, W] to [N, num_output_features, H // 2, W // 2], and likewise in one and three
    dimensions.
    """

    def __init__(
        self, num_input_features: int, num_output_features: int, *, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        kinds = dimensions.modules(spatial_dims)
        num_input_features = arguments.integer("num_input_features", num_input_features)
        num_output_features = arguments.integer("num_output_features", num_output_features)
        self.norm = kinds.norm(num_input_features)
        self.relu = nn.ReLU(inplace=False)
        self.conv = kinds.conv(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = kinds.average(kernel_size=2, stride=2)

    def plain(self, input: Tensor) -> Tensor:
        """The submodules called one by one."""
        for module in self:
            input = module(input)
        return input

    def step(
        self, obstacle: str | None, channels: int | None, expected: Expected
    ) -> DenseStep | MaxTransitionStep | str:
        """The transition as the tail of a block without layers."""
        if obstacle is not None:
            return obstacle
        parts: Any = self._modules
        relu = "relu" in parts
        if list(parts) != ["norm", *(["relu"] if relu else []), "conv", "pool"]:
            return f"its submodules are {', '.join(parts)}"
        norm, conv, pool = parts["norm"], parts["conv"], parts["pool"]
        found = layer_parts.transition_obstacle(norm, conv, channels, expected)
        if relu:
            found = found or named("relu", eligibility.exactly(parts["relu"], nn.ReLU))
        found = found or named("pool", eligibility.average_pool(pool, expected.dims))
        linear = not relu and not eligibility.norm_with_relu(norm)
        return found or DenseStep([], "bottleneck", TailParts(norm, conv, linear=linear))


def _parts(layer: nn.Module) -> LayerParts | str:
    """Of a `DenseLayer`."""
    if layer.bottleneck:
        return layer_parts.usual_parts(layer)
    return layer_parts.wide_parts(layer)


eligibility.KINDS.update({DenseLayer: "layer", DenseBlock: "block", Transition: "transition"})
layer_parts.READERS[DenseLayer] = _parts
