"""The operators that run a whole block: C++'s loop over the layers is Python's, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_operator_cases import CASES, BlockCase, check, compiled, outcome
from devices import CPU, CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_arguments import BLOCKS, arguments, tensors
from torch import Tensor

from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")
DIRECTIONS = ("forward", "backward")
directions = pytest.mark.parametrize("direction", DIRECTIONS)


@st.composite
def block_cases(draw: st.DrawFn) -> BlockCase:
    layers = draw(st.integers(1, 4))
    sizes = st.tuples(*[st.integers(1, 20)] * layers)
    norms = st.sets(st.integers(0, 2 * layers - 1)).map(sorted).map(tuple)
    dtype, wide = draw(
        st.sampled_from(
            [
                (torch.float32, False),
                (torch.float64, False),
                (torch.bfloat16, False),
                (torch.bfloat16, True),
            ]
        )
    )
    pixels = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
    return BlockCase(
        pixels=draw(pixels.filter(lambda size: math.prod(size) > 1)),  # statistics need two
        channels=draw(st.integers(1, 40)),
        growths=draw(sizes),
        widths=draw(st.tuples(*[st.integers(0, 20)] * layers)),
        frozen=draw(norms),
        plain=draw(norms),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        dtype=dtype,
        wide=wide,
        channels_last=draw(st.booleans()),
        tail=draw(st.booleans()),
        recompute=draw(st.booleans()),
        held=draw(st.integers(0, layers)),
        lowest=draw(st.integers(-1, layers - 1)),
        needs=draw(st.tuples(*[st.tuples(*[st.booleans()] * 4)] * layers)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60)
@given(case=block_cases())
@directions
def test_any_block(direction: str, case: BlockCase) -> None:
    with use_backend("cpu"):
        check(case, direction)


@pytest.mark.parametrize("name", CASES)
@directions
def test_chosen_blocks(direction: str, name: str) -> None:
    with use_backend("cpu"):
        check(CASES[name], direction)


@directions
def test_what_a_call_does_not_reach_stays(direction: str) -> None:
    """The first layer's half-layers change nothing of the second's, nor the other way round."""
    case = BlockCase()

    def part(operator: Callable[..., None], given: dict[str, Any]) -> None:
        operator(*{**given, "first": 2, "last": 4}.values())

    def nothing(operator: Callable[..., None], given: dict[str, Any]) -> None:
        operator(*{**given, "first": 3, "last": 3}.values())

    with use_backend("cpu"):
        before = outcome(case, direction, compiled(direction), nothing)
        after = outcome(case, direction, compiled(direction), part)
    untouched = {"forward": ("bottlenecks[0]", "bottlenecks[2]"), "backward": ("gradients[2]",)}
    for name in (*untouched[direction], "gradients[17]"):
        if name in after:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(after["bottlenecks[1]"], before["bottlenecks[1]"])


# Refusals: torch.ops called directly


Change = Callable[[dict[str, Any]], dict[str, Any]]


def _list(name: str, index: int, make: Callable[[Tensor], Tensor]) -> Change:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        values = list(given[name])
        values[index] = make(values[index])
        return {name: values}

    return change


def _shorter(name: str) -> Change:
    return lambda given: {name: given[name][:-1]}


WRONG: dict[str, tuple[Change, str]] = {
    "too few parameters": (_shorter("parameters"), "must describe 2 layers"),
    "too few bottlenecks": (_shorter("bottlenecks"), "must describe 2 layers"),
    "too few numbers": (_shorter("numbers"), "must describe 2 layers"),
    "too few frozen": (_shorter("frozen"), "must describe 2 layers"),
    "too many seeds": (lambda given: {"seeds": [*given["seeds"], 3]}, "must describe 3 layers"),
    "short statistics": (_shorter("statistics"), "statistics must have"),
    "statistics' type": (
        lambda given: {"statistics": given["statistics"].double()},
        "`statistics` should have type Float, got Double",
    ),
    "no room": (lambda given: {"vectors": given["vectors"][:-1]}, "no room"),
    "features' type": (lambda given: {"features": given["features"].int()}, "float32 and float64"),
    "no features": (lambda given: {"features": given["features"][:0]}, "at least one element"),
    "a norm's size": (
        _list("parameters", 6, lambda t: t[1:]),
        "`norm1.weight` should have 13 elements, got 12",
    ),
    "a norm's type": (
        _list("parameters", 9, torch.Tensor.double),
        "`norm2.weight` should have type Float",
    ),
    "conv1's channels": (
        _list("parameters", 2, lambda t: t[:, 1:]),
        "`weight` should have 9 input channels",
    ),
    "conv2's kernel": (
        _list("parameters", 11, lambda t: t[..., :2]),
        "3 elements in every dimension",
    ),
    "a weight's type": (
        _list("parameters", 2, torch.Tensor.double),
        "`weight` should have type Float, or float32, got Double",
    ),
    "a frozen norm's size": (
        _list("frozen", 6, lambda t: t[1:]),
        "`running_mean` should have 8 elements, got 7",
    ),
    "a bottleneck's width": (
        _list("bottlenecks", 1, lambda t: t[..., 1:]),
        r"should have shape \[2, 6, 5, 8\]",
    ),
    "a bottleneck's size": (_list("bottlenecks", 1, lambda t: t[:1]), r"got \[1, 6, 5, 8\]"),
    "half-layers outside": (lambda _: {"last": 5}, "half-layers .0, 5. of 4"),
    "half-layers below": (lambda _: {"first": -1}, "half-layers .-1, 4. of 4"),
    "half-layers reversed": (lambda _: {"first": 3, "last": 2}, "half-layers .3, 2. of 4"),
}
BACKWARD: dict[str, tuple[Change, str]] = {
    "too few gradients": (_shorter("gradients"), "a slot for its gradient"),
    "gradient buffer": (
        lambda given: {"grad_features": given["grad_features"][..., 1:]},
        "`grad_features` should have shape",
    ),
    "short sums": (_shorter("sums"), "sums must have"),
    "short scratch": (_shorter("grad_growth"), "`grad_growth` should have 240 elements"),
    "short scratch too": (_shorter("grad_norm"), "`grad_norm` should have 480 elements"),
    "one gradient of two": (_list("gradients", 9, lambda t: t[:0]), "norm2 has one gradient"),
    "a gradient's size": (
        _list("gradients", 2, lambda t: t[1:]),
        "`grad_weight` should have 72 elements",
    ),
    "a gradient's type": (
        _list("gradients", 2, torch.Tensor.double),
        "`grad_weight` should have type Float",
    ),
    "data without sums": (
        lambda given: _list("gradients", 6, lambda t: t[:0])(
            {**given, **_list("gradients", 7, lambda t: t[:0])(given)}
        ),
        "sums are wanted",
    ),
    "a lowest layer above all": (lambda _: {"lowest": 3}, "lowest"),
    "more held than there are": (lambda _: {"held": 3}, "held"),
    "less held than none": (lambda _: {"held": -1}, "held"),
}


@pytest.mark.parametrize("backend", [CPU, CUDA], indirect=True)
@pytest.mark.parametrize(
    ("op", "wrong"),
    [(op, wrong) for op in BLOCKS for wrong in WRONG] + [(BLOCKS[1], wrong) for wrong in BACKWARD],
)
def test_refused_before_anything_is_written(backend: str, op: str, wrong: str) -> None:
    change, words = {**WRONG, **BACKWARD}[wrong]
    given = arguments(op)
    before = {name: tensor.clone() for name, tensor in tensors(given)}
    with pytest.raises(RuntimeError, match=words):
        getattr(torch.ops.densenet_fast, op)(*{**given, **change(given)}.values())
    for name, tensor in tensors(given):
        assert torch.equal(tensor, before[name]), name


UPDATES: dict[str, tuple[Change, str]] = {
    "too few places": (_shorter("places"), "must describe 3 norms"),
    "too few buffers": (_shorter("running"), "must describe 3 norms"),
    "too few momenta": (_shorter("momenta"), "must describe 2 norms"),
    "one value": (lambda _: {"count": 1}, "more than one value"),
    "a place outside": (_list("places", 1, lambda _: 10**6), "statistics end before"),
    "a place below": (_list("places", 0, lambda _: -1), "statistics end before"),
    "a total outside": (_list("places", 10, lambda _: 10**6), "statistics end before"),
    "negative channels": (_list("places", 3, lambda _: -1), "statistics end before"),
    "a buffer's size": (
        _list("running", 5, lambda t: t[1:]),
        "`running_var` should have 8 elements, got 7",
    ),
    "a buffer's type": (
        _list("running", 2, torch.Tensor.double),
        "`running_mean` should have type Float, got Double",
    ),
    "a counter's type": (_list("counters", 1, torch.Tensor.int), "one int64"),
    "a counter's size": (_list("counters", 1, lambda t: t.expand(2)), "one int64"),
}


@pytest.mark.parametrize("backend", [CPU, CUDA], indirect=True)
@pytest.mark.parametrize("wrong", UPDATES)
def test_running_statistics_are_all_updated_or_none(backend: str, wrong: str) -> None:
    change, words = UPDATES[wrong]
    given = arguments("update_running_statistics_")
    before = {name: tensor.clone() for name, tensor in tensors(given)}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.densenet_fast.update_running_statistics_(*{**given, **change(given)}.values())
    for name, tensor in tensors(given):
        assert torch.equal(tensor, before[name]), name
