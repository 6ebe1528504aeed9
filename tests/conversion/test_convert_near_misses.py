"""Blocks that are almost dense ones: each runs exactly as before, fused or left alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import GROWTH, START, WIDTH, Functional, conv_norm_relu, layers_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from library_networks import assert_same_step, images
from torch import Tensor, nn

from densenet_fast import convert


class Skipping(nn.Module):
    """Features of two sizes, concatenated: no dense connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_norm_relu(START, GROWTH, 3)
        self.up = conv_norm_relu(GROWTH, GROWTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        small = self.down(F.max_pool2d(x, 2))
        return torch.cat([x, self.up(F.interpolate(small, scale_factor=2))], 1)


def test_another_kind_of_network_is_not_of_the_family() -> None:
    with pytest.raises(ValueError, match="convert found no dense block in Skipping"):
        convert(Skipping())


# What a layer may do otherwise, and what a block may. Those of the first tuples are still chains.
CHAINS = (
    "as usual",
    "eps",
    "momentum",
    "affine",
    "no statistics",
    "wide",
    "frozen",
    "sync",
    "bias",
    "bottleneck's bias",
)
LAYERS = (
    "no first ReLU",
    "no second ReLU",
    "leaky",
    "ReLU first",
    "stride",
    "groups",
    "dilation",
    "5×5",
    "reflect",
    "group norm",
    "scaled",
    "oldest left out",
    "newest left out",
    "one read twice",
    "added",
    "norm read twice",
    "writes to its input",
    "random",
)
BLOCK_CHAINS = ("all", "newest first", "new only", "reversed", "last only")
BLOCKS = (
    "residual",
    "twice",
    "ReLU behind",
    "shared layers",
    "features kept",
    "two outputs",
    "newest unused",
)


class Odd(nn.Module):
    """A layer with one thing that is not as usual."""

    def __init__(self, channels: list[int], what: str) -> None:
        super().__init__()
        self.what = what
        if what == "oldest left out":
            channels = channels[1:] or channels
        if what == "newest left out":
            channels = channels[:-1] or channels
        if what == "one read twice":
            channels = [*channels, channels[0]]
        read, width = sum(channels), WIDTH + 3 * (what == "wide")
        options: dict[str, Any] = {"eps": 1e-3} if what == "eps" else {}
        options |= {"momentum": None} if what == "momentum" else {}
        options |= {"affine": False} if what == "affine" else {}
        options |= {"track_running_stats": False} if what == "no statistics" else {}
        kind = nn.SyncBatchNorm if what == "sync" else nn.BatchNorm2d
        self.norm1: nn.Module = kind(read, **options)
        self.conv1 = nn.Conv2d(read, width, 1, bias=what == "bottleneck's bias")
        self.norm2 = nn.BatchNorm2d(width, **options)
        if what == "group norm":
            self.norm1 = nn.GroupNorm(1, read)
        taps: dict[str, Any] = {"padding": 1, "kernel_size": 3, "bias": what == "bias"}
        taps |= {"groups": 2} if what == "groups" else {}
        taps |= {"dilation": 2, "padding": 2} if what == "dilation" else {}
        taps |= {"kernel_size": 5, "padding": 2} if what == "5×5" else {}
        taps |= {"padding_mode": "reflect"} if what == "reflect" else {}
        taps |= {"stride": 2} if what == "stride" else {}
        self.conv2 = nn.Conv2d(width, GROWTH, **taps)
        if what == "frozen":
            self.norm1.eval()

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.what == "oldest left out":
            features = features[1:] or features
        if self.what == "newest left out":
            features = features[:-1] or features
        if self.what == "one read twice":
            features = [*features, features[0]]
        x = torch.cat(features, 1)
        if self.what == "writes to its input":
            x = x.mul_(1.5)
        if self.what == "random" and random.random() < 0:
            x = -x
        if self.what == "ReLU first":
            x = self.conv1(self.norm1(F.relu(x)))
        else:
            normalised = self.norm1(x)
            activate = F.leaky_relu if self.what == "leaky" else F.relu
            active = normalised if self.what == "no first ReLU" else activate(normalised)
            x = self.conv1(active)
            if self.what == "norm read twice":
                x = x + normalised.mean()
        x = self.norm2(x)
        x = self.conv2(x if self.what == "no second ReLU" else F.relu(x))
        if self.what == "stride":
            x = F.interpolate(x, features[0].shape[2:])
        if self.what == "scaled":
            x = 0.5 * x
        return x + features[0][:, :GROWTH] if self.what == "added" else x


class OddDenseBlock(nn.Module):
    def __init__(self, whats: list[str], what: str) -> None:
        super().__init__()
        self.what = what
        channels = [START]
        self.layers = nn.ModuleList()
        for layer in whats:
            self.layers.append(Odd(channels, layer))
            channels = [GROWTH, *channels] if what == "newest first" else [*channels, GROWTH]
        first, second = self.layers[0], self.layers[-1]
        if what == "shared layers" and first.conv1.out_channels == second.conv1.out_channels:
            second.norm2, second.conv2 = first.norm2, first.conv2
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        features = [x]
        for layer in self.layers:
            new = layer(features)
            features = [new, *features] if self.what == "newest first" else [*features, new]
        if self.what == "new only":
            features = features[1:]
        if self.what == "newest unused":
            features = features[:-1]
        if self.what == "reversed":
            features = features[::-1]
        if self.what == "last only":
            return features[-1]
        if self.what == "twice":
            features = [*features, features[1]]
        output = torch.cat(features, 1)
        if self.what == "features kept":
            self.kept = output
        if self.what == "residual":
            return output + output.mean()
        if self.what == "two outputs":
            return output, x
        return F.relu(output) if self.what == "ReLU behind" else output


class Network(nn.Module):
    """The odd block, and one that is as usual behind it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.usual = nn.Sequential(*layers_of(Functional, 2, GROWTH))

    def forward(self, x: Tensor) -> Tensor:
        output = self.block(x)
        output = output[0] if isinstance(output, tuple) else output
        return self.usual(output[:, :GROWTH] + output[:, -GROWTH:])


@settings(max_examples=30, deadline=None)
@given(
    layers=st.lists(st.sampled_from((*CHAINS, *LAYERS)), min_size=1, max_size=4),
    block=st.sampled_from((*BLOCK_CHAINS, *BLOCKS)),
    evaluating=st.booleans(),
    seed=st.integers(0, 99),
)
@example(["as usual", "momentum", "eps"], "newest first", False, 0)
@example(["no statistics", "affine", "wide"], "newest first", False, 0)
@example(["as usual", "frozen", "as usual"], "reversed", False, 1)
@example(["as usual", "as usual"], "shared layers", False, 1)
@example(["bottleneck's bias", "frozen", "bottleneck's bias"], "shared layers", False, 1)
@example(["bottleneck's bias", "no statistics", "bottleneck's bias"], "reversed", True, 1)
@example(["as usual", "as usual"], "features kept", False, 1)
def test_any_block_runs_as_before(
    layers: list[str], block: str, evaluating: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    network = Network(OddDenseBlock(layers, block)).double()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    network.train(not evaluating)
    reference = copy.deepcopy(network)
    report = convert(network)
    assert report["usual"].converted
    odd = {row.name: row.reason for row in report if row.name.startswith("block")}
    usual = set(layers) <= set(CHAINS)
    if usual and block in (*BLOCK_CHAINS, "shared layers"):
        assert odd == {"block": None}
    elif block in BLOCKS and block != "shared layers":
        assert odd.get("block", "left out")
    x = images(seed, (2, START, 6, 6))
    assert_same_step(network, reference, x)
    if block == "features kept":
        torch.testing.assert_close(network.block.kept, reference.block.kept)


@pytest.mark.parametrize("what", LAYERS)
def test_one_odd_layer_makes_a_block_left_alone(what: str) -> None:
    torch.manual_seed(0)
    network = Network(OddDenseBlock(["as usual", what, "as usual"], "all")).double()
    rows = {row.name: row.reason for row in convert(network)}
    assert rows["usual"] is None
    assert rows["block"]
