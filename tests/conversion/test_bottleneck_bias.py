"""A bias between two norms, which fused layers leave to the second: against plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import forms
import pytest
import torch
from forms import WIDTH
from library_networks import assert_same_step, assert_same_training, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_fast import convert, fusion_report
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint


def frozen() -> nn.Module:
    return pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(WIDTH)


# The norm behind the bias, and whether the bias has no effect in training.
NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "usual": (lambda: nn.BatchNorm2d(WIDTH), True),
    "not affine": (lambda: nn.BatchNorm2d(WIDTH, affine=False), True),
    "without statistics": (lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False), True),
    "average of all steps": (lambda: nn.BatchNorm2d(WIDTH, momentum=None), True),
    "last step alone": (lambda: nn.BatchNorm2d(WIDTH, momentum=1.0), True),
    "synchronised": (lambda: nn.SyncBatchNorm(WIDTH), True),
    "in evaluation": (lambda: nn.BatchNorm2d(WIDTH).eval(), False),
    "in evaluation, not affine": (lambda: nn.BatchNorm2d(WIDTH, affine=False).eval(), False),
    "frozen": (frozen, False),
}


def block(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(*forms.layers_of(forms.BiasedBottleneck, 3, 6))
    for layer in found:
        layer.bn2 = NORMS[norm][0]()
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            values = getattr(layer.bn2, name, None)
            if values is not None:
                nn.init.uniform_(values, low, low + 1)
    return found.double()


def converted(norm: str, mode: Checkpoint = "bottleneck") -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused block, the same as it came, and an input."""
    fused = block(norm)
    plain = copy.deepcopy(fused)
    assert convert(fused, checkpoint=mode).complete
    assert all(row.fused for row in fusion_report(fused))
    return fused, plain, images(0, (2, 6, 5, 7))


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_training(norm: str, mode: Checkpoint) -> None:
    fused, plain, x = converted(norm, mode)
    assert_same_training(fused, plain, x)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient(norm: str) -> None:
    fused, _, x = converted(norm)
    fused(x).square().sum().backward()
    for layer in fused:
        bias: Any = layer.conv1.bias
        assert bool((bias.grad == 0).all()) is NORMS[norm][1]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("norm", ["usual", "in evaluation"])
def test_in_a_graph(norm: str) -> None:
    fused, plain, x = converted(norm)
    graph = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same_training(graph, plain, x)


def test_checkpointed_by_others() -> None:
    """Which run the forward twice, and so update running statistics twice."""
    fused, plain, x = converted("usual")
    x.requires_grad_()

    class Checkpointed(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.module, x, use_reentrant=False)

    assert_same_step(Checkpointed(fused), Checkpointed(plain), x)


@pytest.mark.parametrize("norm", ["usual", "in evaluation"])
def test_bfloat16(norm: str) -> None:
    fused, plain, x = converted(norm)
    exact = plain(x)
    errors = []
    for one in (fused, plain):
        one.to(torch.bfloat16)
        errors.append((one(x.bfloat16()).double() - exact).norm())
    assert errors[0] <= 1.5 * errors[1]
