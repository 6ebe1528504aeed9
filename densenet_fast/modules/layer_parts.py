"""Where layers and transitions keep norms and convolutions, for every type that runs fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from densenet_fast.modules import eligibility
from densenet_fast.modules.dimensions import Conv, Norm
from densenet_fast.modules.eligibility import Expected, named


class LayerParts(NamedTuple):
    """What a layer computes with: norm1, ReLU, conv1, norm2, ReLU, conv2 and dropout.

    Without a bottleneck norm1 and conv1 are None: norm2, ReLU and conv2 read the features. The
    convolutions may have a bias.
    `activations` are modules that must be a ReLU each, by name; a norm may have its own inside.
    `dropout` is the probability of zeroing an element of the layer's output now, or with
    `whole_channels` a whole channel of an image. `order` are the pieces of the features (0 is the
    block's input, i what layer i adds) as the first norm and convolution read them; None: as they
    are added.
    """

    norm1: Norm | None
    conv1: Conv | None
    norm2: Norm
    conv2: Conv
    activations: Sequence[tuple[str, nn.Module]]
    dropout: float
    whole_channels: bool = False
    order: Sequence[int] | None = None

    @property
    def norms(self) -> list[Norm]:
        """Those that there are, the one over the features first."""
        return [self.norm2] if self.norm1 is None else [self.norm1, self.norm2]

    @property
    def convolutions(self) -> list[Conv]:
        """Those that there are, the one that reads the features first."""
        return [self.conv2] if self.conv1 is None else [self.conv1, self.conv2]

    @property
    def of_features(self) -> Norm:
        """The norm over the features."""
        return self.norms[0]

    @property
    def first(self) -> Conv:
        """The convolution that reads the features."""
        return self.convolutions[0]

    @property
    def width(self) -> int:
        """Channels of the bottleneck; 0 where there is none."""
        return 0 if self.conv1 is None else eligibility.weight_shape(self.conv1)[0]

    @property
    def emitted(self) -> int:
        """Channels of the features that it reads and of those that it adds."""
        read, added = map(eligibility.weight_shape, (self.first, self.conv2))
        return read[1] + added[0]

    def obstacle(self, channels: int | None, expected: Expected) -> str | None:
        """Why they cannot be fused on an input of so many channels (None: of norm1's), or None."""
        norm1, conv1, norm2, conv2, activations, *_ = self
        found = None if conv1 is None else named("conv1", eligibility.conv(conv1, 1, expected))
        found = found or named("conv2", eligibility.conv(conv2, 3, expected))
        if found is not None:
            return found
        if channels is None:
            norm = self.of_features
            channels = eligibility.channels_of(norm) if eligibility.is_norm(norm) else 0
        bottleneck = eligibility.weight_shape(conv2)[1]
        if eligibility.weight_shape(self.first)[1] != channels or (
            conv1 is not None and eligibility.weight_shape(conv1)[0] != bottleneck
        ):
            return "the shapes of the convolutions do not fit together"
        if norm1 is not None:
            found = named("norm1", eligibility.norm(norm1, channels, expected))
        found = found or named("norm2", eligibility.norm(norm2, bottleneck, expected))
        for name, module in activations:
            found = found or named(name, eligibility.exactly(module, nn.ReLU))
        return found


class TailParts(NamedTuple):
    """What computes behind a block: a transition's norm and convolution, or a final norm.

    `order` is that of a layer. A `linear` transition has no ReLU. Behind a final norm are ReLU and
    the average over all pixels, whose dimensions go or are `kept` with one pixel each.
    """

    norm: Norm
    conv: Conv | None = None
    order: Sequence[int] | None = None
    linear: bool = False
    kept: bool = False


def transition_obstacle(
    norm: Any, conv: Any, channels: int | None, expected: Expected
) -> str | None:
    """Why a transition's norm and convolution cannot be fused on so many channels, or None."""
    if (found := eligibility.conv(conv, 1, expected)) is not None:
        return f"conv {found}"
    read = eligibility.weight_shape(conv)[1]
    if channels is not None and read != channels:
        return f"conv reads {read} channels, not {channels}"
    return named("norm", eligibility.norm(norm, read, expected))


# By a layer's exact type: what gives its parts, or what is in the way of finding them.
READERS: dict[type[nn.Module], Callable[[nn.Module], LayerParts | str]] = {}


def named_parts(
    modules: dict[str, Any], dropout: float, activations: Sequence[str] = ("relu1", "relu2")
) -> LayerParts | str:
    """Parts under torchvision's names."""
    try:
        relus = [(name, modules[name]) for name in activations]
        norm1, conv1 = modules["norm1"], modules["conv1"]
        norm2, conv2 = modules["norm2"], modules["conv2"]
    except KeyError as missing:
        return f"{missing.args[0]} is missing"
    return LayerParts(norm1, conv1, norm2, conv2, relus, dropout)


def sequential_parts(
    modules: dict[str, Any], dropout: float, *, whole_channels: bool = False
) -> LayerParts | str:
    """The same parts as all that a Sequential runs, which is what it has, in that order."""
    if tuple(modules) != ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2"):
        return f"its submodules are {', '.join(modules)}"
    parts = named_parts(modules, dropout)
    return parts if isinstance(parts, str) else parts._replace(whole_channels=whole_channels)


def usual_parts(layer: nn.Module) -> LayerParts | str:
    """Parts of a layer with torchvision's names, its dropout among them as `drop_rate`."""
    state = layer.__dict__  # for every layer of every forward: not through __getattr__
    return named_parts(state["_modules"], dropout(state))


def wide_parts(layer: nn.Module) -> LayerParts | str:
    """Parts of a layer without a bottleneck, by the same names."""
    state = layer.__dict__
    modules = state["_modules"]
    try:
        norm, relu, conv = (modules[name] for name in ("norm1", "relu1", "conv1"))
    except KeyError as missing:
        return f"{missing.args[0]} is missing"
    return LayerParts(None, None, norm, conv, [("relu1", relu)], dropout(state))


def dropout(state: dict[str, Any]) -> float:
    """The probability of zeroing an output now, from a layer's `__dict__`."""
    rate: float = eligibility.setting(state, "drop_rate") if state["training"] else 0.0
    return rate


def fusable(parts: LayerParts | str, channels: int | None, expected: Expected) -> LayerParts | str:
    """The parts, or why they cannot be fused on an input of so many channels (None: of norm1's)."""
    return parts if isinstance(parts, str) else parts.obstacle(channels, expected) or parts


def read(layer: nn.Module, expected: type[nn.Module]) -> LayerParts | str:
    """The layer's parts, or the obstacle to calling it as anything but a module."""
    reader = READERS.get(type(layer))
    if reader is None:
        return eligibility.other_type(layer, expected)
    return eligibility.touched(layer) or reader(layer)
