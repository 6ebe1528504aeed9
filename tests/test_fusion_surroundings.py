"""States of the process and kinds of input under which everything runs through plain modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from comparison import Recorder, assert_close, both, networks, without_inplace
from torch import nn
from torch.nn.modules import module as torch_module

from densenet_fast.fusion import fusion_report
from densenet_fast.layers import DenseBlock
from densenet_fast.model import EfficientDenseNet

SIZE = (2, 3, 32, 32)

GLOBAL_HOOKS = {
    "forward": torch_module.register_module_forward_hook,
    "forward_pre": torch_module.register_module_forward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
    "backward_pre": torch_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules(kind: str) -> None:
    expected, ours = networks()
    without_inplace(ours)
    calls: list[type] = []
    handle = GLOBAL_HOOKS[kind](lambda module, *args: calls.append(type(module)))
    try:
        assert "all modules" in str(fusion_report(ours))
        ours(torch.randn(SIZE, dtype=torch.float64)).sum().backward()
    finally:
        handle.remove()
    assert calls.count(nn.BatchNorm2d) == sum(
        isinstance(part, nn.BatchNorm2d) for part in expected.modules()
    )


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast_equals_torchvision(train: bool) -> None:
    expected, ours = networks(torch.float32)
    both((expected, ours), lambda module: module.train(train))
    images = torch.randn(SIZE)
    with bfloat16():
        assert "autocast" in str(fusion_report(ours))
        wanted, actual = expected(images), ours(images)
    assert actual.dtype == wanted.dtype
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    for output in (wanted, actual):
        output.float().sum().backward()
    found = dict(ours.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-2, atol=1e-3)
    assert fusion_report(ours).all_fused


def test_forward_mode_differentiation() -> None:
    expected, ours = (network.eval() for network in networks())
    images, tangent = torch.randn(2, *SIZE, dtype=torch.float64)
    wanted = torch.func.jvp(expected, (images,), (tangent,))
    assert_close(torch.func.jvp(ours, (images,), (tangent,))[1], wanted[1], "tangent")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, tangent)
        actual = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
    assert_close(actual, wanted[1], "tangent")


def test_function_transforms() -> None:
    expected, ours = (network.eval() for network in networks())
    images = torch.randn(3, *SIZE, dtype=torch.float64)
    assert_close(torch.func.vmap(ours)(images), torch.func.vmap(expected)(images), "vmap")
    grad = torch.func.grad(lambda x: ours(x).sum())(images[0])
    assert_close(grad, torch.func.grad(lambda x: expected(x).sum())(images[0]), "grad")


def test_traced_and_exported_graphs() -> None:
    ours = networks()[1].eval()
    images = torch.randn(SIZE, dtype=torch.float64)
    wanted = ours(images)
    larger = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    traced = torch.jit.trace(ours, images)
    assert_close(traced(images), wanted, "torch.jit.trace")
    assert_close(traced(larger), ours(larger), "torch.jit.trace of another batch")
    assert_close(torch.fx.symbolic_trace(ours)(images), wanted, "torch.fx")
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(ours, (images,), dynamic_shapes=batch).module()
    assert_close(exported(larger), ours(larger), "torch.export")


@pytest.mark.parametrize("make", [lambda: networks()[1], lambda: DenseBlock(2, 3, 2, 4, 0.0)])
def test_compiled_networks_break_the_graph(make: Callable[[], nn.Module]) -> None:
    network = make().double()
    images = torch.randn(SIZE, dtype=torch.float64)
    compiled = torch.compile(network, backend="eager")
    network.eval()
    assert_close(compiled(images), network(images), "evaluation")
    network.train()
    compiled(images).square().sum().backward()
    actual = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    network(images).square().sum().backward()
    for found, parameter in zip(actual, network.parameters(), strict=True):
        assert_close(found, parameter.grad, "gradient", floor=1e-6)


def test_meta_tensors_give_shapes() -> None:
    with torch.device("meta"):
        network = EfficientDenseNet(4, (2, 2), 6, num_classes=3)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 3)
        assert "meta" in str(fusion_report(network))


def test_tensor_subclasses_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tagged(torch.Tensor):
        pass

    block = DenseBlock(2, 3, 2, 4, 0.0)
    recorder = Recorder(monkeypatch)
    images = torch.randn(SIZE)
    plain = block(images.as_subclass(Tagged))
    assert isinstance(plain, Tagged)
    assert recorder.runs == []
    torch.testing.assert_close(plain.as_subclass(torch.Tensor), block(images))


def test_mixed_precision_norms_take_the_plain_path() -> None:
    """float32 norms in a bfloat16 network are a usual mixture."""
    network = EfficientDenseNet(4, (2, 2), 6, num_classes=3).bfloat16()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.float()
    output = network(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
