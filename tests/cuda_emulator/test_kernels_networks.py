"""Whole networks, forward and backward, with every operator run by the emulated CUDA kernels."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from devices import device
from emulated_ops import EmulatedOps
from emulation import Emulator
from torch import Tensor, nn

from densenet_fast import EfficientDenseNet, ops, reference
from densenet_fast.backend import use_backend

OPS = [name for name, value in vars(ops).items() if hasattr(value, "__wrapped__")]
# How often each mode computes a bottleneck that it does not hold.
MODES = {"none": 1, "bottleneck": 2, "block": 3}
TINY: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 2),
    "num_init_features": 6,
    "bn_size": 2,
    "num_classes": 5,
}


def install(monkeypatch: pytest.MonkeyPatch, emulated: EmulatedOps) -> list[str]:
    """Run all operators under the emulator, behind their checks; a list of those that run."""
    called: list[str] = []

    def replacement(name: str) -> Any:
        check = getattr(ops, name).__wrapped__
        signature = inspect.signature(check)

        def operator(*args: Any, **kwargs: Any) -> None:
            if check(*args, **kwargs) is False:  # parameters of a type that no kernel reads
                assert name in ("norm_coefficients", "update_running_statistics")
                getattr(reference, name)(*args, **kwargs)
                return
            called.append(name)
            getattr(emulated, name)(*signature.bind(*args, **kwargs).args)

        return operator

    for name in OPS:
        monkeypatch.setattr(ops, name, replacement(name))
    return called


def network(mode: str, dtype: torch.dtype, **kwargs: Any) -> EfficientDenseNet:
    """The same parameters and statistics in any type."""
    torch.manual_seed(3)
    net = EfficientDenseNet(**{**TINY, **kwargs}, checkpoint=mode).double()
    generator = torch.Generator().manual_seed(5)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in ((part.weight, 0.5, 1.5), (part.bias, -0.5, 0.5)):
                values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.copy_(low + (high - low) * values)
    return net.to(device(), dtype)


def unfused(net: nn.Module) -> nn.Module:
    """The network with a hook at every leaf, so that PyTorch's own modules compute it."""
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_: None)
    return net


def step(net: nn.Module, dtype: torch.dtype, size: tuple[int, ...]) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a training step."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(size, generator=generator, dtype=torch.float64).to(device(), dtype)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(11)  # dropout
    output = net(images)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(weights.to(output))
    results = {"output": output.detach(), "grad of the input": images.grad}
    results |= {f"grad of {n}": p.grad for n, p in net.named_parameters()}
    buffers = {n: b for n, b in net.named_buffers() if b.is_floating_point()}
    return {n: t.detach().double() for n, t in {**results, **buffers}.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("small_inputs", [False, True], ids=["imagenet", "cifar"])
def test_a_training_step(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    dtype: torch.dtype,
    small_inputs: bool,
) -> None:
    size = (2, 3, 9, 10) if small_inputs else (2, 3, 35, 40)
    options = {"small_inputs": small_inputs, "drop_rate": 0.1 if mode == "block" else 0.0}
    with use_backend("reference"):
        exact = step(network(mode, torch.float64, **options), torch.float64, size)
        net = network(mode, dtype, **options)
        if dtype == torch.float64 and mode != "block":  # dropout draws otherwise
            net = unfused(net)  # against itself there would be no rounding
        plain = step(net, dtype, size)
    emulator.ops.allow_tf32 = False
    called = install(monkeypatch, emulator.ops)
    actual = step(network(mode, dtype, **options), dtype, size)
    layers = sum(TINY["block_config"])
    assert called.count("conv3x3_backward") == layers
    held = TINY["block_config"][1] if mode != "none" else 0  # the second block is small
    assert called.count("conv1x1_forward") == layers * MODES[mode] - held
    # Some forty operations follow each other.
    eps = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    largest = max(float(value.norm()) for name, value in exact.items() if "grad" in name)
    for name, value in exact.items():
        size_of = max(float(value.norm()), 1e-2 * largest if "grad" in name else 0.0)
        bound = 2 * error(plain[name], value) + eps * size_of
        assert error(actual[name], value) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    with use_backend("reference"), torch.no_grad():
        exact = network("bottleneck", torch.float64).eval()(images.double())
        plain = network("bottleneck", dtype).eval()(images).double()
    emulator.ops.allow_tf32 = False
    called = install(monkeypatch, emulator.ops)
    with torch.no_grad():
        actual = network("bottleneck", dtype).eval()(images).double()
    assert "conv3x3_forward" in called
    floor = 4 * torch.finfo(dtype).eps * float(exact.norm())
    assert error(actual, exact) <= 2 * error(plain, exact) + floor


def test_a_step_repeats_its_bits_in_another_order(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, emulator.ops)
    results = []
    for order in ("forward", "reverse", "random"):
        emulator.schedule(order, 9)
        results.append(step(network("bottleneck", torch.bfloat16), torch.bfloat16, (2, 3, 33, 32)))
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name
