"""Networks side by side with torchvision's: the same parameters, steps, and what must agree."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import device
from torch import Tensor, nn

from densenet_fast.modules import steps as fused_steps
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock
from densenet_fast.operators.torch_internals import BatchNorm

pytest.importorskip("torchvision")
from torchvision.models.densenet import DenseNet, _DenseBlock

SMALL: dict[str, Any] = {
    "growth_rate": 4,
    "block_config": (2, 3, 2),
    "num_init_features": 6,
    "bn_size": 2,
    "num_classes": 5,
}


def shake(module: nn.Module, seed: int = 0) -> None:
    """Norms as training leaves them: fresh ones are the identity, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            for name, low, high in (
                ("weight", -0.5, 1.5),
                ("bias", -0.5, 0.5),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2.0),
            ):
                tensor = getattr(part, name)
                if tensor is not None:
                    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.data.copy_(low + (high - low) * values)


def tiny(**kwargs: Any) -> EfficientDenseNet:
    """A network of two blocks of two layers that is always the same, with shaken norms."""
    torch.manual_seed(0)
    shape = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 3}
    made = EfficientDenseNet(**{**shape, **kwargs})
    shake(made)
    return made


def networks(
    dtype: torch.dtype = torch.float64, *, small_inputs: bool = False, seed: int = 0, **kwargs: Any
) -> tuple[nn.Module, EfficientDenseNet]:
    """torchvision's network and ours with the same parameters and running statistics."""
    shape = {**SMALL, **{k: v for k, v in kwargs.items() if k in SMALL or k == "drop_rate"}}
    torch.manual_seed(seed)
    expected = DenseNet(**shape)
    ours = EfficientDenseNet(**{**SMALL, **kwargs}, small_inputs=small_inputs)
    if small_inputs:
        parts = OrderedDict(expected.features.named_children())
        for name in ("norm0", "relu0", "pool0"):
            del parts[name]
        parts["conv0"] = nn.Conv2d(3, shape["num_init_features"], 3, padding=1, bias=False)
        expected.features = nn.Sequential(parts)
    expected.to(device(), dtype)
    shake(expected, seed)
    ours.to(device(), dtype).load_state_dict(expected.state_dict())
    return expected, ours


def blocks(
    num_layers: int,
    num_input_features: int,
    bn_size: int,
    growth_rate: int,
    drop_rate: float = 0.0,
    **kwargs: Any,
) -> tuple[nn.Module, DenseBlock]:
    """torchvision's dense block and ours with the same parameters and statistics, in float64."""
    shape = (num_layers, num_input_features, bn_size, growth_rate, drop_rate)
    expected = _DenseBlock(*shape).to(device(), torch.float64)
    shake(expected)
    ours = DenseBlock(*shape, **kwargs).to(device(), torch.float64)
    ours.load_state_dict(expected.state_dict())
    return expected, ours


def both(pair: tuple[nn.Module, nn.Module], change: Callable[[nn.Module], Any]) -> None:
    """Make the same change to both."""
    for module in pair:
        change(module)


def assert_close(actual: Tensor, expected: Tensor, what: str, floor: float = 0.0) -> None:
    """Relative in norm; `floor` is the size below which a tensor is rounding error."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    error = torch.linalg.vector_norm((actual - expected).double()).item()
    size = torch.linalg.vector_norm(expected.double()).item()
    assert error <= 1e-9 * max(size, floor), f"{what}: error {error:.3e} against norm {size:.3e}"


def assert_same_state(ours: nn.Module, expected: nn.Module) -> None:
    """Parameters, running statistics and counters agree."""
    actual = ours.state_dict()
    assert list(actual) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert_close(actual[name], value, name, floor=1e-3)


def assert_same_gradients(ours: nn.Module, expected: nn.Module) -> None:
    """Every parameter has the same gradient, or neither has one."""
    gradients = [p.grad for p in expected.parameters() if p.grad is not None]
    largest = max((g.norm().item() for g in gradients), default=0.0)
    found = dict(ours.named_parameters())
    for name, parameter in expected.named_parameters():
        actual, wanted = found[name].grad, parameter.grad
        assert (actual is None) == (wanted is None), name
        if actual is not None and wanted is not None:
            assert_close(actual, wanted, f"gradient of {name}", floor=1e-4 * largest)


def gradient_of(output: Tensor) -> Tensor:
    """A gradient for `output` that is the same for every network."""
    generator = torch.Generator().manual_seed(output.numel())
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return values.to(output)


def step(module: nn.Module, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """Forward and backward; the output and the input's gradient."""
    input = input.detach().clone().requires_grad_()
    output = module(input)
    if output.requires_grad:
        output.backward(gradient_of(output))
    return output.detach(), input.grad


def assert_same_gradients_in_a_graph(model: nn.Module, input: Tensor) -> None:
    """Of a copy that is compiled as one graph."""
    compiled = copy.deepcopy(model)
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for one in (model, graph):
        one(input).square().sum().backward()
    for mine, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def assert_same_steps(
    pair: tuple[nn.Module, nn.Module], size: tuple[int, ...], steps: int = 2
) -> None:
    """Outputs, all gradients and the state agree through several steps of gradient descent."""
    expected, ours = pair
    torch.manual_seed(1)
    for number in range(steps):
        images = torch.randn(size, dtype=torch.float64).to(device())
        both(pair, lambda module: module.zero_grad())
        wanted, wanted_grad = step(expected, images)
        actual, actual_grad = step(ours, images)
        assert_close(actual, wanted, f"output of step {number}")
        if wanted_grad is not None:
            assert actual_grad is not None
            assert_close(actual_grad, wanted_grad, f"input gradient of step {number}")
        assert_same_gradients(ours, expected)
        assert_same_state(ours, expected)
        for module in pair:
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad / (1 + parameter.grad.norm())


def without_inplace(network: nn.Module) -> None:
    """Full backward hooks forbid working in place on what they return, in torchvision too."""
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False


def replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes for another GPU, on the CPU."""
    copied = module._replicate_for_data_parallel()
    copied._former_parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, 1.0 * parameter)
    for name, child in module._modules.items():
        setattr(copied, name, replica(child))
    return copied


class Recorder:
    """Counts the fused nodes of a forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[int] = []
        original = fused_steps.fused

        def recorded(input: Tensor, block: Any, *args: Any) -> Tensor:
            self.runs.append(len(block.layers))
            return original(input, block, *args)

        monkeypatch.setattr(fused_steps, "fused", recorded)
