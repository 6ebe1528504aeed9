"""Small networks of every library that `convert` knows, and what a step of two networks shares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from densenet_fast.operators.torch_internals import BatchNorm

TOLERANCE = 1e-11  # float64, reductions of some thousand elements
SHAPE = (3, 3, 32, 32)
EDGES = (13, 16, 9)


def torchvision_network(**changes: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.DenseNet(8, (2, 3), 16, **{"num_classes": 5, **changes})


def timm_network(**changes: Any) -> nn.Module:
    densenet = pytest.importorskip("timm.models.densenet")
    return densenet.DenseNet(8, (2, 3), **{"num_classes": 5, **changes})


def timm_blur_network(**changes: Any) -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return timm_network(aa_layer=layers.BlurPool2d, **changes)


def monai_network(dims: int = 2, **changes: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    shape = {"init_features": 16, "growth_rate": 8, "block_config": (2, 3)}
    return nets.DenseNet(dims, 3, 5, **shape, **changes)


def xrv_network(**changes: Any) -> nn.Module:
    xrv = pytest.importorskip("torchxrayvision.models")
    shape = {"num_classes": 5, "in_channels": 3, **changes}
    return xrv.DenseNet(8, (2, 3), 16, **shape)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision_network,
    "torchvision-memory-efficient": lambda: torchvision_network(memory_efficient=True),
    "timm": timm_network,
    "timm-deep": lambda: timm_network(stem_type="deep"),
    "timm-deep-tiered": lambda: timm_network(stem_type="deep_tiered"),
    "timm-blur": timm_blur_network,
    "timm-blur-everywhere": lambda: timm_blur_network(aa_stem_only=False),
    "timm-max-pool": lambda: timm_network(global_pool="max"),
    "monai": monai_network,
    "monai-dropout": lambda: monai_network(dropout_prob=0.5).eval(),
    "torchxrayvision": xrv_network,
    "torchxrayvision-sigmoid": lambda: xrv_network(apply_sigmoid=True),
}
LIBRARIES = ("torchvision", "timm", "monai", "torchxrayvision")
# All of these run fused throughout.
WHOLE = ("torchvision", "torchvision-memory-efficient", "timm", "monai", "torchxrayvision")


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().double()


def images(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sized_images(
    dims: int, count: int = 3, *, channels: int = 2, edges: tuple[int, ...] = EDGES
) -> torch.Tensor:
    """Images of one, two or three dimensions, of odd sizes."""
    return images(dims, (count, channels, *edges[:dims]))


def plain_copy(model: nn.Module, flag: str = "memory_efficient") -> nn.Module:
    """A copy that recomputes nothing: recomputation updates running statistics twice."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, flag):
            setattr(module, flag, False)
    return copied


def assert_same_step(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Outputs, gradients and buffers of one step agree.

    A norm's backward divides by the variance: with next to none, as of two pixels, rounding grows.
    Where ours is exactly zero, plain PyTorch may have the rounding errors of gradients that cancel.
    """
    variances = [1.0]

    def note(norm: nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        if norm.training:
            found = args[0].detach().transpose(0, 1).flatten(1).var(1, unbiased=False)
            variances.append(float(found.min()))

    norms = [norm for norm in reference.modules() if isinstance(norm, BatchNorm)]
    hooks = [norm.register_forward_hook(note) for norm in norms]
    output, expected = model(x), reference(x)
    for hook in hooks:
        hook.remove()
    tolerance = max(TOLERANCE, 8 * torch.finfo(x.dtype).eps / (min(variances) + 1e-5))
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for out in (output, expected):
        out.square().sum().backward()
    given = [part.grad for part in reference.parameters() if part.grad is not None]
    largest = max((float(gradient.abs().max()) for gradient in given), default=0.0)
    for (name, one), (_, other) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        cancelled = one.grad is not None and not one.grad.any()
        torch.testing.assert_close(
            one.grad,
            other.grad,
            rtol=tolerance,
            atol=tolerance * max(1.0, largest if cancelled else 0.0),
            msg=lambda text, n=name: n + text,
        )
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_same_training(model: nn.Module, reference: nn.Module, x: torch.Tensor) -> None:
    """Three steps of gradient descent agree, and the evaluation behind them."""
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, reference)]
    for _ in range(3):
        assert_same_step(model, reference, x)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        output, expected = model.eval()(x), reference.eval()(x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
