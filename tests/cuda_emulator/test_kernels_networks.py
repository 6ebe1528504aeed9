"""Whole networks, forward and backward, with every operator run by the emulated CUDA kernels."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from devices import device
from dispatched import Run
from emulated_ops import EmulatedOps
from emulation import Emulator
from ops_arguments import loop_in_python
from torch import Tensor, nn

from densenet_fast import EfficientDenseNet, operators
from densenet_fast.blocks import stem
from densenet_fast.operators import reference
from densenet_fast.operators.backends import use_backend
from densenet_fast.operators.rows import channels_last_format
from densenet_fast.operators.torch_internals import BatchNorm

OPS = [name for name, op in vars(operators).items() if isinstance(op, operators.Operator)]
OPS = [name for name in OPS if hasattr(reference, name)]  # blocks have a loop of their own
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
    """Run all operators under the emulator; a list of those that run.

    Blocks by Python's loop over their layers.
    """
    called: list[str] = []

    def replacement(name: str) -> Any:
        signature = inspect.signature(getattr(reference, name))

        def operator(*args: Any, **kwargs: Any) -> None:
            called.append(name)
            getattr(emulated, name)(*signature.bind(*args, **kwargs).args)

        return operator

    for name in OPS:
        monkeypatch.setattr(operators, name, replacement(name))
    loop_in_python(monkeypatch)
    monkeypatch.setattr(stem, "in_place", lambda device, *, synchronised: False)  # as on a GPU
    monkeypatch.setattr(
        operators, "_update_running_statistics_", emulated.update_running_statistics_
    )
    return called


def network(mode: str, dtype: torch.dtype, **kwargs: Any) -> EfficientDenseNet:
    """The same parameters and statistics in any type."""
    torch.manual_seed(3)
    net = EfficientDenseNet(**{**TINY, **kwargs}, checkpoint=mode).double()
    generator = torch.Generator().manual_seed(5)
    for part in net.modules():
        if isinstance(part, BatchNorm):
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
    images = images.contiguous(memory_format=channels_last_format(len(size))).requires_grad_()
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
def test_how_often_a_step_computes(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    called = install(monkeypatch, emulator.ops)
    step(network(mode, torch.float32), torch.float32, (2, 3, 33, 32))
    layers = sum(TINY["block_config"])
    assert called.count("conv3x3_backward") == layers
    held = TINY["block_config"][1] if mode != "none" else 0  # the second block is small
    assert called.count("conv1x1_forward") == layers * MODES[mode] - held


class Step(NamedTuple):
    """A training step of one network."""

    mode: str
    dtype: torch.dtype
    small_inputs: bool
    dims: int = 2

    def __str__(self) -> str:
        inputs = "cifar" if self.small_inputs else "imagenet"
        return f"{inputs}-{self.dtype}-{self.mode}-{self.dims}d"

    @property
    def options(self) -> dict[str, Any]:
        dropout = 0.1 if self.mode == "block" else 0.0
        sizes = {"small_inputs": self.small_inputs, "spatial_dims": self.dims}
        return {**sizes, "drop_rate": dropout}

    @property
    def size(self) -> tuple[int, ...]:
        if self.small_inputs:
            return (2, 3, *(9, 10, 5)[: self.dims])
        return (2, 3, *((17, 20, 19) if self.dims == 3 else (35, 40)[: self.dims]))

    def run(self) -> dict[str, Tensor]:
        return step(network(self.mode, self.dtype, **self.options), self.dtype, self.size)


TYPES = (torch.float32, torch.bfloat16, torch.float64)
STEPS = [
    Step(mode, dtype, small_inputs)
    for small_inputs in (False, True)
    for dtype in TYPES
    for mode in MODES
]
STEPS += [Step("bottleneck", dtype, False, dims) for dims in (1, 3) for dtype in TYPES]
STEPS += [Step("block", torch.float32, True, dims) for dims in (1, 3)]


def inference(dtype: torch.dtype) -> Tensor:
    images = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return network("bottleneck", dtype).eval()(images).double()


@pytest.fixture(scope="module")
def emulated(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the steps and inference give on emulated kernels, in C++'s loop over the layers."""
    file = tmp_path_factory.mktemp("emulated") / "results"
    code = f"""
from test_kernels_networks import STEPS, inference
results = {{str(step): step.run() for step in STEPS}}
results |= {{str(dtype): inference(dtype) for dtype in (torch.float32, torch.bfloat16)}}
torch.save(results, {str(file)!r})
"""
    run(code)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


@pytest.mark.parametrize("training", STEPS, ids=str)
def test_a_training_step(emulated: dict[str, Any], training: Step) -> None:
    mode, dtype, *_ = training
    actual = emulated[str(training)]
    with use_backend("reference"):
        exact = training._replace(dtype=torch.float64).run()
        plain = [training.run()]
        # Dropout draws otherwise, and the CPU averages no volumes of bfloat16.
        if mode != "block" and (dtype, training.dims) != (torch.bfloat16, 3):
            plainly = unfused(network(mode, dtype, **training.options))
            modules = step(plainly, dtype, training.size)
            # In float64 the definition against itself would have no rounding. Else both are asked:
            # what cancels is all rounding, and one result says little of its size.
            plain = [modules] if dtype == torch.float64 else [*plain, modules]
    # Some forty operations follow each other.
    eps = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    largest = max(float(value.norm()) for name, value in exact.items() if "grad" in name)
    for name, value in exact.items():
        size_of = max(float(value.norm()), 1e-2 * largest if "grad" in name else 0.0)
        bound = 2 * max(error(result[name], value) for result in plain) + eps * size_of
        assert error(actual[name], value) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference(emulated: dict[str, Any], dtype: torch.dtype) -> None:
    with use_backend("reference"):
        exact, plain = inference(torch.float64), inference(dtype)
    floor = 4 * torch.finfo(dtype).eps * float(exact.norm())
    assert error(emulated[str(dtype)], exact) <= 2 * error(plain, exact) + floor


def test_a_step_repeats_its_bits_in_another_order(run: Run, library: Path) -> None:
    code = f"""
import host_build
from test_kernels_networks import network, step
emulator, results = host_build.Library({str(library)!r}), []
for order in ("forward", "reverse", "random"):
    emulator.set_order(order, 9)
    results.append(step(network("bottleneck", torch.bfloat16), torch.bfloat16, (2, 3, 33, 32)))
for other in results[1:]:
    for name, value in results[0].items():
        assert torch.equal(other[name], value), name
print(len(results))
"""
    assert run(code) == "3\n"
