"""`optimize_for_inference`: the same bits as in evaluation, from a snapshot, and no other mode."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_networks import LIBRARIES, make
from torch import Tensor, nn

import densenet_fast
from densenet_fast import DenseBlock, EfficientDenseNet, OptimizedNetwork, optimize_for_inference
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

TINY: dict[str, Any] = {
    "growth_rate": 5,
    "block_config": (2, 3),
    "num_init_features": 7,
    "bn_size": 2,
    "num_classes": 4,
}
TYPES = (torch.float32, torch.float64, torch.bfloat16)

needs_kernels = pytest.mark.skipif(not extension.LOADED, reason="there are no compiled kernels")


def network(dtype: torch.dtype = torch.float32, **kwargs: Any) -> EfficientDenseNet:
    """In evaluation, with running statistics of its own."""
    torch.manual_seed(0)
    net = EfficientDenseNet(**{**TINY, **kwargs})
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return net.to(dtype).eval()


def images(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size or (2, 3, 40, 36), generator=torch.Generator().manual_seed(1)).to(dtype)


def runs_prepared(optimized: OptimizedNetwork) -> bool:
    """Whether the last call left something prepared."""
    return any(prepared is not None for prepared in optimized._prepared.values())


def assert_same(optimized: OptimizedNetwork, plain: nn.Module, given: Tensor) -> None:
    with torch.no_grad():
        expected = plain(given)
    for _ in range(2):  # the first call of a size is another one
        assert torch.equal(optimized(given), expected)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("small_inputs", [False, True], ids=["imagenet", "cifar"])
def test_the_same_bits(dtype: torch.dtype, small_inputs: bool) -> None:
    plain = network(dtype, small_inputs=small_inputs)
    optimized = optimize_for_inference(plain)
    for size in ((2, 3, 40, 36), (1, 3, 33, 47), (3, 3, 64, 64), (2, 3, 40, 36)):
        given = images(*size, dtype=dtype)
        assert_same(optimized, plain, given)
        assert_same(optimized, plain, given.contiguous(memory_format=torch.channels_last))
    assert runs_prepared(optimized)


@needs_kernels
@settings(max_examples=25, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    growth=st.sampled_from([1, 4, 12, 17, 32]),
    features=st.integers(1, 20),
    bn_size=st.integers(1, 4),
    count=st.integers(1, 3),
    height=st.integers(16, 60),
    width=st.integers(16, 60),
    small=st.booleans(),
)
def test_any_network(
    blocks: list[int],
    growth: int,
    features: int,
    bn_size: int,
    count: int,
    height: int,
    width: int,
    small: bool,
) -> None:
    plain = network(
        growth_rate=growth,
        block_config=tuple(blocks),
        num_init_features=features,
        bn_size=bn_size,
        small_inputs=small,
    )
    optimized = optimize_for_inference(plain)
    assert_same(optimized, plain, images(count, 3, height, width))
    assert runs_prepared(optimized)


@needs_kernels
@pytest.mark.parametrize("library", LIBRARIES)
def test_converted_networks(library: str) -> None:
    model = make(library).float().eval()
    densenet_fast.convert(model)
    optimized = optimize_for_inference(model)
    channels = next(p.shape[1] for p in model.parameters() if p.dim() == 4)
    assert_same(optimized, model, images(2, channels, 64, 64))
    # torchxrayvision's forward stays its own.
    assert runs_prepared(optimized) == (library != "torchxrayvision")


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_transition_without_relu_and_a_bias_in_a_bottleneck(dtype: torch.dtype) -> None:
    model: Any = make("torchvision").eval()
    usual = model.features.transition1
    model.features.transition1 = nn.Sequential(usual.norm, usual.conv, usual.pool)
    conv = model.features.denseblock2.denselayer1.conv1
    conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    model.to(dtype)
    assert densenet_fast.convert(model).complete
    optimized = optimize_for_inference(model)
    assert_same(optimized, model, images(2, 3, 64, 64, dtype=dtype))
    assert runs_prepared(optimized)


@needs_kernels
def test_sizes_share_packed_weights() -> None:
    optimized = optimize_for_inference(network(growth_rate=32))
    for side in range(32, 64):
        given = images(1, 3, side, side)
        optimized(given)
    prepared = next(iter(optimized._prepared.values()))
    assert prepared is not None
    for block in prepared.blocks:
        assert len({packed.data_ptr() for packed in block.packed.values()}) <= 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_snapshot(backend: Any) -> None:
    with use_backend(backend):
        model = network().train()
        given = images()
        optimized = optimize_for_inference(model)
        expected = optimized(given)
        before = copy.deepcopy(model.state_dict())
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model.features.denseblock1.register_forward_hook(lambda *_: torch.zeros(1))
        assert torch.equal(optimized(given), expected)
        assert model.classifier.weight.shape == before["classifier.weight"].shape
        # Optimized once more, it is the same.
        assert torch.equal(optimize_for_inference(optimized)(given), expected)


def test_new_weights_are_used() -> None:
    model, other = network(), network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    optimized = optimize_for_inference(model)
    optimized(images())
    optimized.network.load_state_dict(other.state_dict())
    optimized.load_state_dict({f"network.{k}": v for k, v in other.state_dict().items()})
    assert_same(optimized, other, images())
    optimized.double()
    assert_same(optimized, other.double(), images().double())


def test_training_and_gradients_are_refused() -> None:
    optimized = optimize_for_inference(network())
    assert optimized.eval() is optimized
    with pytest.raises(RuntimeError, match="for evaluation alone: train the network that it was"):
        optimized.train()
    assert not any(module.training for module in optimized.modules())
    with pytest.raises(RuntimeError, match=r"no gradients, but its input requires one.*detach"):
        optimized(images().requires_grad_())
    output = optimized(images())
    assert not output.requires_grad
    with torch.inference_mode():
        assert torch.equal(optimized(images()), output)
    with pytest.raises(TypeError, match=r"should be a torch[.]nn[.]Module, got str"):
        optimize_for_inference("densenet121")  # type: ignore[arg-type]


def test_bad_images_are_refused_as_by_the_network() -> None:
    plain = network()
    optimized = optimize_for_inference(plain)
    optimized(images())
    for wrong in (images(2, 4, 40, 36), images(2, 3, 1, 1), images().double(), images()[0], None):
        messages = []
        for module in (plain, optimized):
            with pytest.raises(Exception) as error:  # noqa: PT011
                module(wrong)
            messages.append((error.type, str(error.value)))
        assert messages[0] == messages[1]
    assert_same(optimized, plain, images())


def test_what_stands_in_the_way_runs_as_usual() -> None:
    seen: list[int] = []
    hooked = network()
    hooked.features.denseblock1.denselayer2.register_forward_hook(lambda *_: seen.append(1))
    optimized = optimize_for_inference(hooked)
    assert_same(optimized, hooked, images())
    assert len(seen) == 4
    other = network()
    other.features.transition1 = nn.Sequential(nn.Conv2d(17, 8, 1), nn.MaxPool2d(2)).eval()
    other.features.denseblock2 = nn.Identity()
    other.features.norm5 = nn.BatchNorm2d(8).eval()
    other.classifier = nn.Linear(8, 2)
    assert_same(optimize_for_inference(other), other, images())
    joined = network()  # two blocks without anything between them
    joined.features.transition1 = DenseBlock(1, 17, 2, 3, 0.0)
    joined.features.denseblock2 = DenseBlock(1, 20, 2, 5, 0.0)
    joined.features.norm5 = nn.BatchNorm2d(25)
    joined.classifier = nn.Linear(25, 2)
    assert_same(optimize_for_inference(joined), joined.eval(), images())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    assert_same(optimize_for_inference(plain), plain, images())
    whole = network()
    optimized = optimize_for_inference(whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(optimized, whole, images())
    compiled = torch.compile(optimized, backend="eager")
    assert torch.equal(compiled(images()), optimized(images()))


@needs_kernels
def test_other_kernels_pack_again() -> None:
    plain = network(growth_rate=32)
    optimized = optimize_for_inference(plain)
    given = images(1, 3, 64, 64)
    try:
        for enabled in (True, False, True):
            densenet_fast.enable_winograd(enabled)
            assert_same(optimized, plain, given)
    finally:
        densenet_fast.enable_winograd(True)


@needs_kernels
def test_threads() -> None:
    plain = network(growth_rate=32)
    optimized = optimize_for_inference(plain)
    cases = [images(1, 3, side, 64) for side in range(40, 56)] * 4
    with torch.no_grad():
        expected = [plain(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(optimized, cases))
    assert all(map(torch.equal, found, expected))


def test_pickling_and_copies() -> None:
    optimized = optimize_for_inference(network())
    expected = optimized(images())
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(optimized)),
        copy.deepcopy(optimized),
    ):
        assert torch.equal(other(images()), expected)
        assert torch.equal(other(images()), expected)
    weights = sum(t.nbytes for t in network().state_dict().values())
    assert len(file.getvalue()) < 1.5 * weights + 100_000  # packed weights stay here
