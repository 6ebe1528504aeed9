"""A clear error before any work; no state has changed after it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_fast.modules.densenet import EfficientDenseNet, densenet121
from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition


def network(**kwargs: Any) -> EfficientDenseNet:
    return EfficientDenseNet(
        **{"growth_rate": 4, "block_config": (2, 2), "num_init_features": 6, "num_classes": 3}
        | kwargs
    )


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "network": (network, (2, 3, 32, 32)),
    "block": (lambda: DenseBlock(2, 3, 2, 4, 0.0), (2, 3, 8, 8)),
    "layer": (lambda: DenseLayer(3, 4, 2, 0.0), (2, 3, 8, 8)),
    "transition": (lambda: Transition(3, 2), (2, 3, 8, 8)),
}


def on_the_plain_path(module: nn.Module) -> nn.Module:
    """The same module with another activation in some place, which cannot be fused."""
    for parent in reversed(list(module.modules())):
        for name, part in parent.named_children():
            if isinstance(part, nn.ReLU):
                setattr(parent, name, nn.SiLU())
                return module
    raise AssertionError("no activation to replace")


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return on_the_plain_path if request.param == "plain" else lambda module: module


def refuses(
    module: nn.Module, input: Any, error: type[Exception] | tuple[type[Exception], ...], match: str
) -> None:
    """The error comes, and neither statistics nor counters nor parameters have changed."""
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=match):
        module(input)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", MODULES)
class TestEveryModule:
    def test_rank(self, name: str, path: Callable[[nn.Module], nn.Module]) -> None:
        make, size = MODULES[name]
        for wrong in (size[1:], (1, *size), ()):
            refuses(path(make()), torch.randn(wrong), ValueError, r"4-D input \[N, C, H, W\]")

    def test_channels(self, name: str, path: Callable[[nn.Module], nn.Module]) -> None:
        make, (n, _, h, w) = MODULES[name]
        for wrong in (1, 2, 4):
            match = f"expects 3 input channels, got {wrong}"
            refuses(path(make()), torch.randn(n, wrong, h, w), ValueError, match)

    def test_empty_batch(self, name: str, path: Callable[[nn.Module], nn.Module]) -> None:
        make, size = MODULES[name]
        refuses(path(make()), torch.randn(0, *size[1:]), ValueError, "empty batch")
        refuses(path(make().eval()), torch.randn(0, *size[1:]), ValueError, "empty batch")

    def test_images_without_pixels(self, name: str, path: Callable[[nn.Module], nn.Module]) -> None:
        make, (n, c, h, w) = MODULES[name]
        for wrong in ((n, c, 0, w), (n, c, h, 0), (n, 0, h, w)):
            refuses(path(make()), torch.randn(wrong), ValueError, "without any pixel")

    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str
    )
    def test_not_floating_point(
        self, name: str, path: Callable[[nn.Module], nn.Module], dtype: torch.dtype
    ) -> None:
        make, size = MODULES[name]
        refuses(path(make()), torch.zeros(size, dtype=dtype), TypeError, "floating-point input")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_other_dtype_than_the_parameters(
        self, name: str, path: Callable[[nn.Module], nn.Module], dtype: torch.dtype
    ) -> None:
        make, size = MODULES[name]
        match = f"input is {dtype}, but .* is torch.float32"
        refuses(path(make()), torch.randn(size).to(dtype), TypeError, match)
        match = "input is torch.float32, but .* is torch.float64"
        refuses(path(make().double()), torch.randn(size), TypeError, match)

    def test_other_device_than_the_parameters(
        self, name: str, path: Callable[[nn.Module], nn.Module]
    ) -> None:
        make, size = MODULES[name]
        match = "input is on meta, but .* is on cpu"
        refuses(path(make()), torch.empty(size, device="meta"), ValueError, match)

    @pytest.mark.parametrize("wrong", [None, [[1.0]], 3, "image"], ids=str)
    def test_not_a_tensor(self, name: str, wrong: Any) -> None:
        refuses(MODULES[name][0](), wrong, TypeError, "expects a tensor")


def test_one_part_of_another_dtype() -> None:
    """Found before the parts in front of it have run."""
    for name in ("features.denseblock2.denselayer2.conv2", "features.norm5", "classifier"):
        module = network()
        module.get_submodule(name).double()
        refuses(module, torch.randn(2, 3, 32, 32), TypeError, f"but {name}.* is torch.float64")


def test_one_part_on_another_device() -> None:
    module = network()
    module.features.denseblock2.denselayer1.norm2.to("meta")
    with pytest.raises(ValueError, match=r"denseblock2\.denselayer1\.norm2.* is on meta"):
        module(torch.randn(2, 3, 32, 32))
    assert module.features.norm0.num_batches_tracked == 0


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("make", "size", "smallest"),
    [
        (lambda: densenet121(growth_rate=2, block_config=(1, 1, 1, 1)), (28, 64), 29),
        (lambda: densenet121(growth_rate=2, block_config=(1, 1, 1, 1)), (64, 16), 29),
        (network, (4, 4), 5),
        (lambda: network(small_inputs=True, block_config=(1, 1, 1)), (3, 8), 4),
        (lambda: Transition(3, 2), (1, 8), 2),
    ],
)
def test_images_too_small_for_the_pooling(
    make: Callable[[], nn.Module],
    size: tuple[int, int],
    smallest: int,
    train: bool,
    path: Callable[[nn.Module], nn.Module],
) -> None:
    match = f"too small.*{size[0]}×{size[1]}.*at least {smallest}×{smallest}"
    refuses(path(make().train(train)), torch.randn(2, 3, *size), ValueError, match)
    make().train(train)(torch.randn(2, 3, smallest, smallest))


def torch_words(n: int, channels: int) -> str:
    with pytest.raises(ValueError, match="Expected more than 1 value") as raised:
        nn.BatchNorm2d(channels)(torch.randn(n, channels, 1, 1))
    return re.escape(str(raised.value))


@pytest.mark.parametrize(
    ("make", "size", "channels"),
    [
        (lambda: DenseBlock(2, 3, 2, 4, 0.0), (1, 3, 1, 1), 3),
        (lambda: DenseLayer(3, 4, 2, 0.0), (1, 3, 1, 1), 3),
        # 32×32 leaves one pixel for the last of four blocks, of 9 channels before it
        (lambda: densenet121(growth_rate=2, block_config=(1, 1, 1, 1)), (1, 3, 32, 32), 9),
    ],
    ids=["block", "layer", "network"],
)
def test_one_value_per_channel(
    make: Callable[[], nn.Module],
    size: tuple[int, ...],
    channels: int,
    path: Callable[[nn.Module], nn.Module],
) -> None:
    refuses(path(make()), torch.randn(size), ValueError, torch_words(1, channels))
    make().eval()(torch.randn(size))
    make()(torch.randn(2, *size[1:]))


def test_one_value_per_channel_matters_only_to_norms_of_the_batch() -> None:
    block = DenseBlock(2, 3, 2, 4, 0.0)
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    block(torch.randn(1, 3, 1, 1))
    untracked = DenseLayer(3, 4, 2, 0.0).eval()
    untracked.norm2 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    refuses(untracked, torch.randn(1, 3, 1, 1), ValueError, torch_words(1, 8))


def test_no_checks_are_guessed_behind_unknown_modules() -> None:
    """A replaced stem may change size, channels and type."""

    class Stem(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.double().repeat(1, 3, 8, 8)

    module = network().double()
    parts = [part for name, part in module.features.named_children() if name[-1] != "0"]
    module.features = nn.Sequential(Stem(), *parts)
    assert module(torch.randn(2, 2, 1, 1)).shape == (2, 3)


@pytest.mark.parametrize("name", ["features.conv0", "features.pool0", "features.transition1.pool"])
def test_a_stride_of_zero_is_pytorchs_matter(
    name: str, path: Callable[[nn.Module], nn.Module]
) -> None:
    module = path(network())
    module.get_submodule(name).stride = (0, 0)
    with pytest.raises(RuntimeError, match="stride"):
        module(torch.randn(2, 3, 32, 32))


WRONG: dict[str, list[Any]] = {
    "growth_rate": [0, -1, 1.0, True, "4", None],
    "block_config": [(), (2, 0), (2, -1), (2, 1.5), (True, 2), 4, "22", None, {1: 2}, {1, 2}],
    "num_init_features": [0, 2.0, False],
    "bn_size": [0, -4, 4.0, True],
    "drop_rate": [-0.1, 1.1, float("nan"), float("inf"), "0.1", True, None],
    "num_classes": [0, -1, 10.0, True],
    "memory_efficient": [1, 0, None, "yes"],
    "checkpoint": ["all", "", "Bottleneck", None, True, 1],
    "small_inputs": [1, None, "no"],
    "compression": [0, 0.0, -0.5, 1.5, float("nan"), "half", True],
    "in_channels": [0, 3.0, True],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_constructor_arguments(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        network(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("growth_rate", True, TypeError),
        ("growth_rate", 0, ValueError),
        ("drop_rate", "0.1", TypeError),
        ("drop_rate", 2, ValueError),
        ("checkpoint", 3, TypeError),
        ("checkpoint", "some", ValueError),
        ("block_config", (2, 0), ValueError),
        ("block_config", 4, TypeError),
    ],
)
def test_wrong_type_or_wrong_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        network(**{name: value})


def test_compression_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="leaves no channel"):
        network(compression=0.01)


@pytest.mark.parametrize("value", ["all", None, 3])
def test_checkpoint_set_later(value: Any) -> None:
    for module in (network(), DenseBlock(1, 3, 2, 4, 0.0), DenseLayer(3, 4, 2, 0.0)):
        with pytest.raises((TypeError, ValueError), match="checkpoint"):
            module.checkpoint = value
        assert module.checkpoint == "bottleneck"


@pytest.mark.parametrize(
    "make",
    [
        lambda: DenseLayer(0, 4, 2, 0.0),
        lambda: DenseLayer(3, 4, 2, 0.0, 0),
        lambda: DenseLayer(3, 4, 2, 0.0, True),
        lambda: DenseLayer(3, 4, 2, 1.5),
        lambda: DenseBlock(0, 3, 2, 4, 0.0),
        lambda: DenseBlock(2, 3.0, 2, 4, 0.0),
        lambda: DenseBlock(2, 3, 2, 4, 0.0, checkpoint="most"),
        lambda: Transition(3, 0),
        lambda: Transition("3", 1),
    ],
)
def test_arguments_of_the_parts(make: Callable[[], nn.Module]) -> None:
    with pytest.raises((TypeError, ValueError), match="must be"):
        make()


def test_integers_of_other_libraries_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    module = network(growth_rate=numpy.int64(4), block_config=[numpy.int32(2)], drop_rate=0)
    assert module(torch.randn(2, 3, 32, 32)).shape == (2, 3)
