"""The implementations that are compared, all with the same parameters under the same names.

`naive` and `memory-efficient` are torchvision's own layers, blocks and transitions. torchvision
assembles them only with the ImageNet stem and a compression of one half; `PlainDenseNet`
assembles the same classes for every other network. Of sequences and volumes `naive` is MONAI's.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import densenet as torchvision_densenet

from benchmarks import engines
from benchmarks import other_peers as others
from benchmarks.networks import NetworkSpec
from benchmarks.other_peers import State
from benchmarks.segmentation import PlainBlock, PlainFCDenseNet

Checkpoint = Literal["none", "bottleneck", "block"]


class PlainDenseNet(nn.Module):
    """torchvision's dense blocks and transitions with any stem, compression and channels."""

    def __init__(self, spec: NetworkSpec, *, memory_efficient: bool) -> None:
        super().__init__()
        stem: list[tuple[str, nn.Module]]
        channels = spec.num_init_features
        if spec.small_inputs:
            stem = [("conv0", nn.Conv2d(spec.in_channels, channels, 3, padding=1, bias=False))]
        else:
            stem = [
                ("conv0", nn.Conv2d(spec.in_channels, channels, 7, 2, padding=3, bias=False)),
                ("norm0", nn.BatchNorm2d(channels)),
                ("relu0", nn.ReLU(inplace=True)),
                ("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1)),
            ]
        self.features = nn.Sequential(OrderedDict(stem))
        for index, num_layers in enumerate(spec.block_config, start=1):
            block: nn.Module
            if spec.bottleneck:
                block = torchvision_densenet._DenseBlock(
                    num_layers, channels, spec.bn_size, spec.growth_rate, 0.0, memory_efficient
                )
            else:  # which torchvision has not
                block = PlainBlock(num_layers, channels, spec.growth_rate, 0.0, spec.dims)
            self.features.add_module(f"denseblock{index}", block)
            channels += num_layers * spec.growth_rate
            if index < len(spec.block_config):
                reduced = int(channels * spec.compression)
                transition = torchvision_densenet._Transition(channels, reduced)
                self.features.add_module(f"transition{index}", transition)
                channels = reduced
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, spec.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        features = nn.functional.relu(self.features(images), inplace=True)
        pooled = nn.functional.adaptive_avg_pool2d(features, (1, 1))
        return self.classifier(torch.flatten(pooled, 1))


def build_torchvision(spec: NetworkSpec, *, memory_efficient: bool) -> nn.Module:
    """torchvision's network, or its layers assembled for what torchvision does not assemble."""
    if spec.segmentation:
        return PlainFCDenseNet(spec)
    if spec.dims != 2:
        return others.build_monai(spec)
    if spec.small_inputs or spec.in_channels != 3 or spec.compression != 0.5:
        return PlainDenseNet(spec, memory_efficient=memory_efficient)
    return torchvision_densenet.DenseNet(
        growth_rate=spec.growth_rate,
        # torchvision annotates four blocks and takes any number.
        block_config=spec.block_config,  # type: ignore[arg-type, unused-ignore]
        num_init_features=spec.num_init_features,
        bn_size=spec.bn_size,
        num_classes=spec.num_classes,
        memory_efficient=memory_efficient,
    )


def _optimized(model: nn.Module, _: Tensor) -> nn.Module:
    from densenet_fast import optimize_for_inference

    return optimize_for_inference(model)


def build_ours(spec: NetworkSpec, *, checkpoint: Checkpoint) -> nn.Module:
    """`EfficientDenseNet` in one of its checkpoint modes, or `FCDenseNet`, which has none."""
    from densenet_fast import EfficientDenseNet, FCDenseNet

    if spec.segmentation:
        return FCDenseNet(
            spec.num_classes,
            spec.growth_rate,
            *spec.paths,
            spec.num_init_features,
            spec.drop_rate,
            in_channels=spec.in_channels,
            spatial_dims=spec.dims,
        )
    return EfficientDenseNet(
        growth_rate=spec.growth_rate,
        block_config=spec.block_config,
        num_init_features=spec.num_init_features,
        bn_size=spec.bn_size,
        num_classes=spec.num_classes,
        checkpoint=checkpoint,
        small_inputs=spec.small_inputs,
        compression=spec.compression,
        in_channels=spec.in_channels,
        spatial_dims=spec.dims,
        bottleneck=spec.bottleneck,
    )


def build_converted(spec: NetworkSpec) -> nn.Module:
    """torchvision's network made efficient in place."""
    from densenet_fast import convert

    model = build_torchvision(spec, memory_efficient=False)
    convert(model)
    return model


@dataclass(frozen=True)
class Peer:
    """One implementation in one memory layout."""

    name: str
    label: str
    color: str  # in plots
    build: Callable[[NetworkSpec], nn.Module]
    memory_format: torch.memory_format = torch.channels_last
    requires: str = "torchvision"  # the module of its library
    applies: Callable[[NetworkSpec], bool] = lambda spec: True
    shares_weights: bool = True  # else another family's own
    compiled: bool = False
    # For inference alone: what runs the network in evaluation mode, made of it and of its images.
    deploy: engines.Deploy | None = None

    def layout(self, spec: NetworkSpec) -> torch.memory_format:
        """The memory format of its weights and images: PyTorch has none for sequences."""
        if self.memory_format == torch.contiguous_format or spec.dims == 1:
            return torch.contiguous_format
        return torch.channels_last if spec.dims == 2 else torch.channels_last_3d

    @property
    def ours(self) -> bool:
        """Whether this is `densenet_fast`."""
        return "ours" in self.name

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return importlib.util.find_spec(self.requires) is not None

    @property
    def naive(self) -> bool:
        """Whether this is torchvision's network as it is, in whichever layout."""
        return self.name.startswith("naive")


def _has_mode(mode: Checkpoint, spec: NetworkSpec) -> bool:
    """An FC-DenseNet has the default alone."""
    return mode == "bottleneck" or not spec.segmentation


def _naive(spec: NetworkSpec) -> nn.Module:
    return build_torchvision(spec, memory_efficient=False)


# Checkpoint mode → color.
MODES: dict[Checkpoint, str] = {"none": "#92c5de", "bottleneck": "#2166ac", "block": "#053061"}
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("naive", "naive, contiguous", "#7f7f7f", _naive, torch.contiguous_format),
        Peer(
            "naive-channels-last",
            "naive, channels_last",
            "#4d4d4d",
            _naive,
            applies=lambda spec: spec.dims > 1,
        ),
        Peer(
            "memory-efficient",
            "torchvision memory_efficient, channels_last",
            "#e08214",
            lambda spec: build_torchvision(spec, memory_efficient=True),
            applies=lambda spec: spec.dims == 2 and spec.bottleneck,
        ),
        *(
            Peer(
                f"ours-{mode}",
                f'densenet_fast, checkpoint="{mode}"' + " (default)" * (mode == "bottleneck"),
                color,
                partial(build_ours, checkpoint=mode),
                applies=partial(_has_mode, mode),
            )
            for mode, color in MODES.items()
        ),
        Peer(
            "ours-converted", "torchvision after densenet_fast.convert", "#67a9cf", build_converted
        ),
        Peer("compiled-naive", "torch.compile of naive", "#bababa", _naive, compiled=True),
        Peer(
            "compiled-ours",
            'torch.compile of densenet_fast, checkpoint="bottleneck"',
            "#4393c3",
            partial(build_ours, checkpoint="bottleneck"),
            compiled=True,
        ),
        Peer(
            "monai",
            "MONAI, channels_last",
            "#1b7837",
            others.build_monai,
            requires="monai",
            applies=others.like_torchvision,
        ),
        Peer(
            "timm",
            "timm, channels_last",
            "#7fbf7b",
            others.build_timm,
            requires="timm",
            applies=others.like_timm,
        ),
        *(
            Peer(
                f"resnet{depth}",
                f"ResNet-{depth}, channels_last",
                color,
                partial(others.build_resnet, f"resnet{depth}"),
                applies=others.beside_resnets,
                shares_weights=False,
            )
            for depth, color in ((50, "#762a83"), (101, "#af8dc3"))
        ),
        Peer(
            "onnxruntime",
            "ONNX Runtime of naive",
            "#c7a76c",
            _naive,
            torch.contiguous_format,
            requires="onnxruntime",
            deploy=engines.onnxruntime,
        ),
        Peer(
            "openvino",
            "OpenVINO of naive",
            "#8c6d31",
            _naive,
            torch.contiguous_format,
            requires="openvino",
            deploy=engines.openvino,
        ),
        Peer(
            "ours-optimized",
            "densenet_fast.optimize_for_inference",
            "#2c7fb8",
            partial(build_ours, checkpoint="none"),
            deploy=_optimized,
        ),
    )
}
# What every suite compares unless told otherwise: torchvision's network, and ours in each mode.
BASIC_PEERS = (
    "naive",
    "naive-channels-last",
    "memory-efficient",
    "ours-none",
    "ours-bottleneck",
    "ours-block",
)


def initial_state(spec: NetworkSpec, seed: int) -> dict[str, Tensor]:
    """The weights that every peer starts from: those of the naive network after `seed`."""
    # The weights are drawn on the CPU: `torch.manual_seed` would seed every GPU too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return others.torchvision_state(_naive(spec).state_dict())


def build(
    peer: Peer,
    spec: NetworkSpec,
    state: State,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The network of one peer with the weights of `state`, which must fit name by name."""
    model = peer.build(spec)
    if peer.shares_weights:
        named = others.monai_state(state) if hasattr(model, "class_layers") else state
        model.load_state_dict(named, strict=True)
    model = model.to(device, dtype).to(memory_format=peer.layout(spec))
    if peer.compiled:
        model.compile(
            dynamic=False
        )  # for these images, as every other size has a network of its own
    return model
