"""Dense layers, blocks and transitions with torchvision's names, fused wherever that is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from densenet_fast import checks, eligibility, geometry
from densenet_fast.specs import Checkpoint
from densenet_fast.steps import DenseStep

if TYPE_CHECKING:
    from densenet_fast.steps import Segment

# The forwards of norms that leave their input alone and return another tensor.
_OUT_OF_PLACE = (
    nn.modules.batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    nn.modules.instancenorm._InstanceNorm.forward,
    nn.GroupNorm.forward,
)


def _may_write(first: nn.Module | None) -> bool:
    """Whether a chain of modules that starts with `first` may write to its input.

    The ReLU of a chain works in place: on the input itself, if what stands for the norm returns it.
    The input is a block's feature buffer, which others read.
    """
    if first is None or eligibility.touched(first) is not None:
        return True
    return type(first).forward not in _OUT_OF_PLACE


def traced(input: Any) -> bool:
    """Whether a graph is being recorded, in which shapes may stand for any shape."""
    return torch.compiler.is_exporting() or isinstance(input, fx.Proxy) or is_tracing()


def refuse_scripting(module: nn.Module) -> Any:
    """What torch.jit.script calls first: its language has no words for fused layers.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script does not support {type(module).__name__}: use torch.export.export, "
        "torch.onnx.export, torch.compile or torch.jit.trace, which need no changes"
    )


def mode_of(memory_efficient: bool, checkpoint: Any) -> Checkpoint:
    """The checkpoint mode that a constructor's two arguments mean together."""
    mode = checks.checkpoint_mode(checkpoint)
    return mode if checks.flag("memory_efficient", memory_efficient) else "none"


class DenseLayer(nn.Module):
    """norm, ReLU, 1×1 convolution, norm, ReLU, 3×3 convolution, concatenated to the input.

    Emits its `num_input_features` channels and `k * growth_rate` new ones. The bottleneck between
    the convolutions has `bn_size * growth_rate` channels whatever `k` is.
    """

    norm1: nn.BatchNorm2d
    relu1: nn.ReLU
    conv1: nn.Conv2d
    norm2: nn.BatchNorm2d
    relu2: nn.ReLU
    conv2: nn.Conv2d
    drop_rate: float

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
    ) -> None:
        super().__init__()
        num_input_features = checks.integer("num_input_features", num_input_features)
        growth_rate = checks.integer("growth_rate", growth_rate)
        bottleneck = checks.integer("bn_size", bn_size) * growth_rate
        growth = checks.integer("k", k) * growth_rate
        drop_rate = checks.probability("drop_rate", drop_rate)
        mode = mode_of(memory_efficient, checkpoint)

        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(num_input_features, bottleneck, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck, growth, kernel_size=3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self._checkpoint = mode

    @property
    def checkpoint(self) -> Checkpoint:
        """What is kept for the backward: "none", "bottleneck" or "block" (see the README)."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, mode: Checkpoint) -> None:
        self._checkpoint = checks.checkpoint_mode(mode)

    def forward(self, input: Tensor) -> Tensor:
        """`input` [N, C, H, W] and the new channels behind it."""
        if traced(input):
            return self._compose(input)
        return self.run(input)

    def run(self, input: Tensor) -> Tensor:
        """The checked forward, fused if nothing is in the way."""
        checks.images(type(self).__name__, input)
        checks.channels(type(self).__name__, input, self._modules.get("norm1"))
        obstacle = eligibility.input(input) or self.obstacle(
            input.shape[1], eligibility.parameter_type(input), input.device
        )
        if obstacle is not None:
            checks.parameters(self, self, input)
        checks.values_per_channel(self, input.shape[0], input.shape[2], input.shape[3])
        if obstacle is not None:
            return self._compose(input)
        return DenseStep([[self]], self._checkpoint).run(input)

    def obstacle(self, channels: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the submodules must be called one by one, or None."""
        parts: Any = self._modules
        try:
            norm1, relu1, conv1 = parts["norm1"], parts["relu1"], parts["conv1"]
            norm2, relu2, conv2 = parts["norm2"], parts["relu2"], parts["conv2"]
        except KeyError as missing:
            return f"{missing.args[0]} is missing"
        if (found := eligibility.conv(conv1, eligibility.POINTWISE, dtype, device)) is not None:
            return f"conv1 {found}"
        if (found := eligibility.conv(conv2, eligibility.SPATIAL, dtype, device)) is not None:
            return f"conv2 {found}"
        bottleneck, read, *_ = eligibility.weight_shape(conv1)
        if read != channels or eligibility.weight_shape(conv2)[1] != bottleneck:
            return "the shapes of the convolutions do not fit together"
        if (found := eligibility.norm(norm1, channels, dtype, device)) is not None:
            return f"norm1 {found}"
        if (found := eligibility.norm(norm2, bottleneck, dtype, device)) is not None:
            return f"norm2 {found}"
        if (found := eligibility.exactly(relu1, nn.ReLU)) is not None:
            return f"relu1 {found}"
        if (found := eligibility.exactly(relu2, nn.ReLU)) is not None:
            return f"relu2 {found}"
        return None

    def _compose(self, input: Tensor) -> Tensor:
        """The submodules called one by one."""
        features = input.clone() if _may_write(self.norm1) else input
        bottleneck = self.conv1(self.relu1(self.norm1(features)))
        growth = self.conv2(self.relu2(self.norm2(bottleneck)))
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

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        """What the submodules' own lines do not say."""
        return f"drop_rate={self.drop_rate}, checkpoint={self._checkpoint!r}"


class DenseBlock(nn.ModuleDict):
    """Layers that each read the concatenation of all features so far.

    Any layer may be replaced by a module that takes the features so far and returns them with its
    own behind them.
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
    ) -> None:
        super().__init__()
        self._checkpoint = mode_of(memory_efficient, checkpoint)
        num_input_features = checks.integer("num_input_features", num_input_features)
        growth_rate = checks.integer("growth_rate", growth_rate)
        for i in range(checks.integer("num_layers", num_layers)):
            layer = DenseLayer(
                num_input_features + i * growth_rate,
                growth_rate,
                bn_size,
                drop_rate,
                checkpoint=self._checkpoint,
            )
            self.add_module(f"denselayer{i + 1}", layer)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is kept for the backward: "none", "bottleneck" or "block" (see the README)."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, mode: Checkpoint) -> None:
        self._checkpoint = checks.checkpoint_mode(mode)
        for layer in self.values():
            if isinstance(layer, DenseLayer):
                layer.checkpoint = mode

    def forward(self, init_features: Tensor) -> Tensor:
        """`init_features` [N, C, H, W] and the features of all layers behind them."""
        if traced(init_features):
            for layer in self.values():
                init_features = layer(init_features)
            return init_features
        return self.run(init_features)

    def run(self, input: Tensor) -> Tensor:
        """The checked forward, fused where nothing is in the way."""
        checks.images(type(self).__name__, input)
        checks.channels(type(self).__name__, input, self.first_reader())
        obstacle = eligibility.input(input)
        segments = self.segments(obstacle, eligibility.parameter_type(input), input.device)
        if not fused_throughout(segments):
            checks.parameters(self, self, input)
        checks.values_per_channel(self, input.shape[0], input.shape[2], input.shape[3])
        return DenseStep(segments, self._checkpoint).run(input)

    __prepare_scriptable__ = refuse_scripting

    def first_reader(self) -> nn.Module | None:
        """The module that decides how many channels the block expects, if one does."""
        first = next(iter(self.values()), None)
        if type(first) is not DenseLayer or eligibility.touched(first):
            return None
        return first._modules.get("norm1")

    def segments(
        self, obstacle: str | None, dtype: torch.dtype, device: torch.device
    ) -> list[Segment]:
        """Longest runs of layers to fuse, and single layers to call, in order."""
        segments: list[Segment] = []
        if obstacle is not None:
            segments.extend(self.values())
            return segments
        run: list[DenseLayer] = []
        channels = None
        for layer in self.values():
            channels, found = layer_obstacle(layer, channels, dtype, device)
            if found is not None or not isinstance(layer, DenseLayer):
                segments.append(layer)
                run = []
            else:
                if not run:
                    segments.append(run)
                run.append(layer)
        return segments


def layer_obstacle(
    layer: nn.Module, channels: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[int | None, str | None]:
    """Channels behind `layer`, if known, and why it must be called as a module, or None.

    `channels` are those before it; None means unknown, as behind a layer of another type.
    """
    if type(layer) is not DenseLayer:
        return None, eligibility.other_type(layer, DenseLayer)
    if channels is None:
        channels = getattr(layer._modules.get("norm1"), "num_features", 0)
    found = eligibility.touched(layer) or layer.obstacle(channels, dtype, device)
    if found is not None:
        return None, found
    return channels + eligibility.weight_shape(layer._modules["conv2"])[0], None


def fused_throughout(segments: list[Segment]) -> bool:
    """Whether no layer is called as a module."""
    return all(isinstance(segment, list) for segment in segments)


class Transition(nn.Sequential):
    """norm, ReLU, 1×1 convolution and 2×2 average pooling between two blocks."""

    norm: nn.BatchNorm2d
    relu: nn.ReLU
    conv: nn.Conv2d
    pool: nn.AvgPool2d

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        num_input_features = checks.integer("num_input_features", num_input_features)
        num_output_features = checks.integer("num_output_features", num_output_features)
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] to [N, num_output_features, H // 2, W // 2]."""
        if traced(input):
            return super().forward(input)
        return self.run(input)

    def run(self, input: Tensor) -> Tensor:
        """The checked forward, fused if nothing is in the way."""
        name = type(self).__name__
        checks.images(name, input)
        first = next(iter(self), None)
        checks.channels(name, input, first)
        obstacle = eligibility.input(input) or self.obstacle(
            input.shape[1], eligibility.parameter_type(input), input.device
        )
        if obstacle is not None:
            checks.parameters(self, self, input)
        geometry.check(name, self, input)
        if obstacle is not None:
            return super().forward(input.clone() if _may_write(first) else input)
        return DenseStep([], "bottleneck", self).run(input)

    __prepare_scriptable__ = refuse_scripting

    def obstacle(
        self, channels: int | None, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Why the submodules must be called one by one, or None. `channels` None: any number."""
        parts = self._modules
        if list(parts) != ["norm", "relu", "conv", "pool"]:
            return f"its submodules are {', '.join(parts)}"
        norm, relu, conv, pool = self
        if (found := eligibility.conv(conv, eligibility.POINTWISE, dtype, device)) is not None:
            return f"conv {found}"
        read = eligibility.weight_shape(conv)[1]
        if channels is not None and read != channels:
            return f"conv reads {read} channels, not {channels}"
        if (found := eligibility.norm(norm, read, dtype, device)) is not None:
            return f"norm {found}"
        if (found := eligibility.exactly(relu, nn.ReLU)) is not None:
            return f"relu {found}"
        if (found := eligibility.average_pool(pool)) is not None:
            return f"pool {found}"
        return None
