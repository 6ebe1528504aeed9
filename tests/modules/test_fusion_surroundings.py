"""States of the process and kinds of input under which everything runs through plain modules."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator

import pytest
import torch
from comparison import Recorder, assert_close, blocks, both, networks, without_inplace
from devices import CPU
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.fusion import fusion_report
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock
from densenet_fast.operators.backends import Setting, use_backend

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
def autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast_without_kernels_equals_torchvision(train: bool) -> None:
    expected, ours = networks(torch.float32)
    both((expected, ours), lambda module: module.train(train))
    images = torch.randn(SIZE)
    with autocast(torch.float16):
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


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("backend", ["reference", CPU])
def test_fused_under_autocast(backend: Setting, checkpoint: Checkpoint) -> None:
    """Where there are kernels for autocast's type, or the reference is forced.

    At most twice the error of torchvision's network under the same autocast, in the median.
    """

    def results(network: nn.Module, images: Tensor) -> list[Tensor]:
        network.zero_grad()
        output = network(images)
        output.square().sum().backward()
        return [output.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    errors: tuple[list[float], list[float]] = ([], [])
    for seed in range(9):
        expected, ours = networks(torch.float32, seed=seed, checkpoint=checkpoint, growth_rate=8)
        images = torch.randn(8, 3, 32, 32)
        truth = results(copy.deepcopy(expected).double(), images.double())
        for network, found in zip((expected, ours), errors, strict=True):
            with use_backend(backend), autocast():
                assert network is expected or fusion_report(ours).all_fused
                actual = results(network, images)
            assert actual[0].dtype == torch.bfloat16
            assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
            assert len(actual) == len(truth)
            relative = [
                float((one.double() - exact).norm() / exact.norm())
                for one, exact in zip(actual, truth, strict=True)
            ]
            found.append(statistics.median(relative))
    assert statistics.median(errors[1]) <= 2 * statistics.median(errors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", CPU])
def test_blocks_alone_under_autocast(
    backend: Setting, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input of either type; the stem's norm and the classifier are not there to help."""
    expected, block = (module.float() for module in blocks(3, 12, 2, 4))
    images = torch.randn(2, 12, 9, 7, dtype=dtype)
    recorder = Recorder(monkeypatch)
    with use_backend(backend), autocast():
        fused = block(images)
    with autocast():
        composed = expected(images)
    assert fused.dtype == torch.bfloat16
    assert recorder.runs == [3]
    torch.testing.assert_close(fused, composed.to(torch.bfloat16), rtol=0.05, atol=0.05)
    fused.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


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
