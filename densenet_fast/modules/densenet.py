"""DenseNet-BC with torchvision's signature, names and initialisation, in less memory.

Annotations are types here, not strings, for torch.fx and torch.jit.script (see `layers`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from densenet_fast import arguments
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.autocast import computed_type
from densenet_fast.blocks.memory_plan import NetworkSize, Plan, within_budget
from densenet_fast.blocks.nodes import planned_shape
from densenet_fast.blocks.specs import NETWORK_MODES, Checkpoint, NetworkMode
from densenet_fast.modules import dimensions, eligibility, fusing, input_checks
from densenet_fast.modules.eligibility import routed
from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition
from densenet_fast.modules.step_sizes import apply_plans, network_size
from densenet_fast.modules.steps import Step
from densenet_fast.weights import pretrained
from densenet_fast.weights.load import LoadedWhole

_SHAPES = 1000  # of images that are remembered to fit


class EfficientDenseNet(LoadedWhole):
    """Densely connected convolutional network (arXiv 1608.06993), exact and memory-efficient.

    Args:
        growth_rate: channels that every layer adds (k in the paper).
        block_config: layers of every block; any number of blocks.
        num_init_features: channels of the first convolution.
        bn_size: bottleneck channels of a layer as a multiple of its growth.
        drop_rate: dropout probability behind every layer.
        num_classes: outputs of the classifier.
        memory_efficient: False means checkpoint="none", whatever `checkpoint` says.
        checkpoint: what blocks keep for the backward: "none" keeps features and bottlenecks,
            "bottleneck" the features alone, "block" the block's input alone. "auto" chooses for
            each block, at every step, what recomputes least within `memory_budget`.
        memory_budget: bytes that a training step may take beyond parameters and images, for
            checkpoint="auto" (see `densenet_fast.memory`).
        small_inputs: the stem for small images (CIFAR): one 3×3 convolution, no pooling.
        compression: share of the channels that a transition keeps.
        in_channels: channels of the images.
        spatial_dims: the images' dimensions: 1, 2 or 3.
        bottleneck: False means layers of norm, ReLU and 3×3 convolution alone, DenseNet without B
            (with `compression=1`, without C), where `bn_size` means nothing.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    __jit_unused_properties__ = ("checkpoint", "memory_budget")
    __constants__ = ("spatial_dims",)
    spatial_dims = 2  # of networks in files that do not say it

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = True,
        *,
        checkpoint: NetworkMode = "bottleneck",
        memory_budget: int | None = None,
        small_inputs: bool = False,
        compression: float = 0.5,
        in_channels: int = 3,
        spatial_dims: int = 2,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        kinds = dimensions.modules(spatial_dims)
        self.spatial_dims = int(spatial_dims)
        growth_rate = arguments.integer("growth_rate", growth_rate)
        blocks = arguments.layer_counts("block_config", block_config)
        num_features = arguments.integer("num_init_features", num_init_features)
        bn_size = arguments.integer("bn_size", bn_size)
        drop_rate = arguments.share("drop_rate", drop_rate, zero=True)
        num_classes = arguments.integer("num_classes", num_classes)
        compression = arguments.share("compression", compression, zero=False)
        in_channels = arguments.integer("in_channels", in_channels)
        mode = arguments.one_of("checkpoint", checkpoint, NETWORK_MODES)
        self._checkpoint = mode if arguments.flag("memory_efficient", memory_efficient) else "none"
        self._memory_budget = arguments.memory_budget(self._checkpoint, memory_budget)

        # Modules are made in torchvision's order: the same seed gives the same parameters.
        self.features = _stem(
            in_channels, num_features, arguments.flag("small_inputs", small_inputs), kinds
        )
        for i, num_layers in enumerate(blocks):
            block = DenseBlock(
                num_layers,
                num_features,
                bn_size,
                growth_rate,
                drop_rate,
                checkpoint=_of_blocks(self._checkpoint),
                spatial_dims=spatial_dims,
                bottleneck=arguments.flag("bottleneck", bottleneck),
            )
            self.features.add_module(f"denseblock{i + 1}", block)
            num_features += num_layers * growth_rate
            if i != len(blocks) - 1:
                kept = arguments.compressed(num_features, compression)
                transition = Transition(num_features, kept, spatial_dims=spatial_dims)
                self.features.add_module(f"transition{i + 1}", transition)
                num_features = kept
        self.features.add_module("norm5", kinds.norm(num_features))
        self.classifier = nn.Linear(num_features, num_classes)

        for module in self.modules():
            if isinstance(module, kinds.conv):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def checkpoint(self) -> NetworkMode:
        """What the blocks keep for the backward: "none", "bottleneck", "block" or "auto"."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, mode: NetworkMode) -> None:
        mode = arguments.one_of("checkpoint", mode, NETWORK_MODES)
        arguments.memory_budget(mode, self._memory_budget)
        self._checkpoint = mode
        for module in self.modules():
            if isinstance(module, (DenseBlock, DenseLayer)):
                module.checkpoint = _of_blocks(mode)

    @property
    def memory_budget(self) -> int | None:
        """Bytes that a training step may take beyond parameters and images, for "auto"."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, size: int | None) -> None:
        self._memory_budget = arguments.memory_budget(self._checkpoint, size)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, num_classes] of images [N, in_channels, *size]."""
        if is_scripting():
            return self._compose(x)
        else:  # noqa: RET505 (what TorchScript does not compile)
            return routed(self, x, self._compose)

    def run(self, x: Tensor) -> Tensor:
        """The checked forward, fused where nothing is in the way."""
        owner = type(self).__name__
        input_checks.images(self, x)
        synchronized.check_modules(self, x.device)
        obstacle = eligibility.input(x) or eligibility.exactly(self.features, nn.Sequential)
        if obstacle is not None:
            self._check(owner, x, list(self.features.children()))
            return self._compose(x)

        steps, pooled, accepted = fusing.planned(self, list(self.features), x)
        compiling = torch.compiler.is_compiling()  # a graph may be for any shape
        if compiling or x.shape not in accepted:
            self._check(owner, x, fusing.called_modules(steps))
            if not compiling and len(accepted) < _SHAPES:
                accepted.add(x.shape)
        if self._checkpoint == "auto" and torch.is_grad_enabled():
            plans = self._plans(steps, pooled, x)
            x = fusing.run(apply_plans(steps, plans), x, hold=False)
        else:
            x = fusing.run(steps, x)
        return self.classifier(x if pooled else relu_and_average(x, self.spatial_dims))

    def inference_steps(
        self, x: Tensor
    ) -> tuple[Sequence[Step], Callable[[Tensor], Tensor]] | None:
        """The steps to the pooled features and what follows them; None: not all of it is fused."""
        steps = self.whole_steps(eligibility.expected(x), recompute=True)
        return None if steps is None else (steps, self.classifier)

    def whole_steps(
        self, expected: eligibility.Expected, *, recompute: bool
    ) -> Sequence[Step] | None:
        """The steps to the pooled features, if all of it is fused."""
        if eligibility.exactly(self.features, nn.Sequential) is not None:
            return None
        steps, pooled = fusing.steps(list(self.features), expected, recompute=recompute)
        return steps if pooled else None

    def step_size(
        self,
        shape: Sequence[int],
        stored: torch.dtype,
        expected: eligibility.Expected,
        *,
        recompute: bool,
    ) -> NetworkSize | None:
        """Sizes of a training step on images of `shape`, if all of it is fused."""
        steps = self.whole_steps(expected, recompute=recompute)
        if steps is None:
            return None
        return network_size(steps, self.classifier, shape, stored, expected.device)

    def to_smallest(self) -> list[nn.Module]:
        """The modules that the smallest features come from."""
        return list(self.features)

    def _plans(self, steps: Sequence[Step], pooled: bool, x: Tensor) -> list[Plan]:
        """What recomputes least within the budget."""
        assert self._memory_budget is not None
        stored = computed_type(x.dtype, x.device.type)
        shape = planned_shape(x.shape)
        network = network_size(steps, self.classifier, shape, stored, x.device)
        if network is None or not pooled:
            raise RuntimeError(
                f'{type(self).__name__}: checkpoint="auto" plans networks that run fused '
                "throughout alone: densenet_fast.fusion_report(model) names what does not"
            )
        return within_budget(network, self._memory_budget)

    def _check(self, owner: str, x: Tensor, called: list[nn.Module]) -> None:
        """Refuse what some module on the way would refuse, before the first one has run.

        Nothing is said about modules behind one of unknown type, which may change anything.
        `called` are the modules whose tensors nobody has looked at yet.
        """
        if type(self.features) is not nn.Sequential or eligibility.touched(self.features):
            return
        modules = list(self.features)
        known = input_checks.chain(owner, modules, x)
        reached = {id(part) for module in known for part in (module, *module.children())}
        for module in called:
            if id(module) in reached and not eligibility.touched(module):
                input_checks.parameters(self, module, x)
        if len(known) == len(modules) and not eligibility.touched(self.classifier):
            input_checks.parameters(self, self.classifier, x)

    def _compose(self, x: Tensor) -> Tensor:
        """The modules called one by one."""
        return self.classifier(relu_and_average(self.features(x), self.spatial_dims))


def _of_blocks(mode: NetworkMode) -> Checkpoint:
    """What a block does by itself, called outside its network."""
    return "bottleneck" if mode == "auto" else mode


def relu_and_average(features: Tensor, spatial_dims: int) -> Tensor:
    """The pooled features [N, C] of features [N, C, *size]."""
    # Not in place: the features may be a block's own buffer, if norm5 was taken out.
    activation = F.relu(features)
    if spatial_dims == 1:
        pooled = F.adaptive_avg_pool1d(activation, 1)
    elif spatial_dims == 2:
        pooled = F.adaptive_avg_pool2d(activation, (1, 1))
    else:
        pooled = F.adaptive_avg_pool3d(activation, (1, 1, 1))
    return torch.flatten(pooled, 1)


def _stem(
    in_channels: int, num_features: int, small_inputs: bool, kinds: dimensions.Modules
) -> nn.Sequential:
    if small_inputs:
        conv = kinds.conv(in_channels, num_features, kernel_size=3, padding=1, bias=False)
        return nn.Sequential(OrderedDict([("conv0", conv)]))
    conv = kinds.conv(in_channels, num_features, kernel_size=7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        OrderedDict(
            [
                ("conv0", conv),
                ("norm0", kinds.norm(num_features)),
                ("relu0", nn.ReLU(inplace=False)),
                ("pool0", kinds.maximum(kernel_size=3, stride=2, padding=1)),
            ]
        )
    )


def densenet121(
    *, weights: str | Enum | None = None, progress: bool = True, **kwargs: Any
) -> EfficientDenseNet:
    """DenseNet-121.

    Args:
        weights: None, or torchvision's pretrained weights by name ("DEFAULT", "IMAGENET1K_V1",
            "DenseNet121_Weights.IMAGENET1K_V1") or as torchvision's enum. They are downloaded by
            torchvision into torch.hub's cache, and set `num_classes`.
        progress: shows the download's progress on stderr.
        **kwargs: those of `EfficientDenseNet`.

    Raises:
        ValueError: there are no such weights, or another argument is not the one they need.
        TypeError: `weights` is of another type, or those of another network.
        ImportError: `weights` needs torchvision.
        RuntimeError: the weights could not be downloaded, or are damaged.
    """
    return _densenet("densenet121", 32, (6, 12, 24, 16), 64, weights, progress, kwargs)


def densenet161(
    *, weights: str | Enum | None = None, progress: bool = True, **kwargs: Any
) -> EfficientDenseNet:
    """DenseNet-161; arguments and errors are those of `densenet121`."""
    return _densenet("densenet161", 48, (6, 12, 36, 24), 96, weights, progress, kwargs)


def densenet169(
    *, weights: str | Enum | None = None, progress: bool = True, **kwargs: Any
) -> EfficientDenseNet:
    """DenseNet-169; arguments and errors are those of `densenet121`."""
    return _densenet("densenet169", 32, (6, 12, 32, 32), 64, weights, progress, kwargs)


def densenet201(
    *, weights: str | Enum | None = None, progress: bool = True, **kwargs: Any
) -> EfficientDenseNet:
    """DenseNet-201; arguments and errors are those of `densenet121`."""
    return _densenet("densenet201", 32, (6, 12, 48, 32), 64, weights, progress, kwargs)


def densenet264(*, weights: None = None, progress: bool = True, **kwargs: Any) -> EfficientDenseNet:
    """DenseNet-264; `kwargs` are those of `EfficientDenseNet`. There are no pretrained weights."""
    return _densenet("densenet264", 32, (6, 12, 64, 48), 64, weights, progress, kwargs)


def _densenet(
    name: str,
    growth_rate: int,
    block_config: tuple[int, ...],
    num_init_features: int,
    weights: str | Enum | None,
    progress: bool,
    kwargs: dict[str, Any],
) -> EfficientDenseNet:
    progress = arguments.flag("progress", progress)
    if "pretrained" in kwargs:
        raise TypeError(
            f"pretrained={kwargs['pretrained']!r} is torchvision's old argument: use "
            'weights="DEFAULT", or None'
        )
    shape: dict[str, Any] = {
        "growth_rate": growth_rate,
        "block_config": block_config,
        "num_init_features": num_init_features,
    }
    if weights is None:
        return EfficientDenseNet(**{**shape, **kwargs})
    chosen = pretrained.Pretrained(name, weights)
    model = EfficientDenseNet(**chosen.arguments(shape, kwargs))
    chosen.load(model, progress)
    return model
