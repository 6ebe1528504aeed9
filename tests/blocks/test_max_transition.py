"""norm, ReLU, 1x1 convolution, dropout and maximum as one node, against PyTorch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import device
from torch import Tensor, nn

from densenet_fast.blocks.max_transition import max_transition
from densenet_fast.blocks.specs import MaxTransition, NormSpec
from densenet_fast.operators import reference
from densenet_fast.operators.philox import draw_seeds
from densenet_fast.operators.rows import images_of

EDGES = (7, 4, 5)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAXIMUM = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Case:
    """Tensors of a transition from six channels to four."""

    def __init__(self, dims: int, *, bias: bool, frozen: bool, p: float, whole: bool) -> None:
        generator = torch.Generator().manual_seed(dims)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device())

        self.input = draw(3, 6, *EDGES[:dims]).requires_grad_()
        self.gamma, self.beta = (draw(6).requires_grad_() for _ in range(2))
        self.running = draw(6), draw(6).abs() + 0.5
        self.weight = draw(4, 6, *[1] * dims).requires_grad_()
        self.bias = draw(4).requires_grad_() if bias else None
        self.dims, self.frozen, self.p, self.whole = dims, frozen, p, whole

    def leaves(self) -> list[Tensor]:
        found = [self.input, self.gamma, self.beta, self.weight]
        return found if self.bias is None else [*found, self.bias]

    def fused(self) -> Tensor:
        momentum = None if self.frozen else 0.25
        norm = NormSpec(self.gamma, self.beta, *self.running, 1e-3, not self.frozen, momentum)
        spec = MaxTransition(norm, self.weight, self.bias, self.p, self.whole)
        return max_transition(self.input, spec)

    def plain(self, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean, var = (vector.clone() for vector in self.running)
        statistics: Any = (mean, var, self.gamma, self.beta, not self.frozen, 0.25, 1e-3)
        full = CONV[self.dims](
            F.relu(F.batch_norm(self.input, *statistics)), self.weight, self.bias
        )
        kept = torch.ones_like(full.movedim(1, -1), memory_format=torch.contiguous_format)
        if self.p:
            reference.dropout_(kept, seed, self.p, self.whole)
        return MAXIMUM[self.dims](full * images_of(kept), 2), (mean, var)


@pytest.mark.parametrize(
    ("bias", "frozen", "p", "whole"),
    [(False, False, 0.0, False), (True, False, 0.4, False), (True, True, 0.4, True)],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_is_the_plain_one(
    backend: str, dims: int, bias: bool, frozen: bool, p: float, whole: bool
) -> None:
    case = Case(dims, bias=bias, frozen=frozen, p=p, whole=whole)
    torch.manual_seed(5)
    expected, statistics = case.plain(int(draw_seeds(1)))
    torch.manual_seed(5)
    output = case.fused()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(case.running, statistics, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    grad = torch.randn(output.shape, dtype=torch.float64).to(output)
    found = torch.autograd.grad(output, case.leaves(), grad)
    for one, other in zip(found, torch.autograd.grad(expected, case.leaves(), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_subset_of_the_gradients() -> None:
    case = Case(2, bias=True, frozen=False, p=0.0, whole=False)
    expected = torch.autograd.grad(case.plain(0)[0].square().sum(), case.leaves())
    for index, leaf in enumerate(case.leaves()):
        for other in case.leaves():
            other.requires_grad_(other is leaf)
        (found,) = torch.autograd.grad(case.fused().square().sum(), [leaf])
        torch.testing.assert_close(found, expected[index], rtol=1e-9, atol=1e-9)


def test_values_that_are_no_numbers_reach_the_output() -> None:
    case = Case(2, bias=False, frozen=True, p=0.0, whole=False)
    with torch.no_grad():
        case.input[1, 2, 3, 1] = torch.nan
    output, (expected, _) = case.fused(), case.plain(0)
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_weight": torch.zeros(4, 5, 1, 1)}, r"conv.weight should have shape \(outputs, 6"),
        ({"conv_bias": torch.zeros(3)}, r"conv.bias should have shape \(4,\)"),
        ({"dropout": 1.5}, "a probability between 0 and 1, got 1.5"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    norm = nn.BatchNorm2d(6)
    running = norm.running_mean, norm.running_var
    spec = NormSpec(norm.weight, norm.bias, *running, 1e-5, True, 0.1)
    transition = MaxTransition(spec, torch.zeros(4, 6, 1, 1))
    with pytest.raises(ValueError, match=message):
        max_transition(torch.randn(2, 6, 4, 4), transition._replace(**change))
    with pytest.raises(ValueError, match="an image of at least 2x2 pixels, got 4x1"):
        max_transition(torch.randn(2, 6, 4, 1), transition)
    assert torch.equal(norm.running_mean, torch.zeros(6))
