"""Fused blocks against their plain composition: outputs, gradients, running statistics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_cases import TAILS, Block, gradients, make_block
from devices import BACKENDS, HALF_TYPES, device, on
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_block import plain_block
from torch import Tensor

from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, LayerSpec, dense_block
from densenet_fast.blocks.specs import Checkpoint


def run(block: Block, checkpoint: Checkpoint = "bottleneck") -> Tensor:
    return dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)


def plain(block: Block) -> Tensor:
    return plain_block(block.input, block.layers, block.tail)


def assert_equal(actual: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(actual, exact, strict=True):
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * size)


def check(block: Block, checkpoint: Checkpoint, tolerance: float = 1e-11) -> None:
    other = block.copy()
    output, exact = run(block, checkpoint), plain(other)
    assert output.dtype == block.input.dtype
    if output.dim() == 4:
        assert output.is_contiguous(memory_format=torch.channels_last)
    assert_equal([output], [exact.detach()], tolerance)
    assert_equal(block.buffers(), other.buffers(), tolerance)
    after = block.buffers()
    leaves = block.leaves()
    actual = gradients(output, leaves)
    assert_equal(actual, gradients(exact, other.leaves()), tolerance)
    for gradient, leaf in zip(actual, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    # The backward recomputes, but a step counts once.
    assert_equal(block.buffers(), after, 0)


FROZEN = {
    "batch": (),
    "norm1": (0, 2, 4),
    "norm2": (1, 3, 5),
    "tail": (6,),
    "some": (1, 2, 4, 6),
    "all": tuple(range(7)),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_modes_tails_and_frozen_norms(
    backend: str, checkpoint: Checkpoint, tail: str | None, frozen: str
) -> None:
    check(make_block(tail=tail, frozen=FROZEN[frozen]), checkpoint)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"eps": (1e-5, 1e-2, 0.3)},
        {"affine": False},
        {"growths": (1, 12, 3)},
        {"growths": ()},
        {"growths": (4,), "shape": (1, 3, 1, 2)},
        {"shape": (2, 1, 1, 7)},
        {"shape": (1, 17, 13, 1)},
        {"shape": (3, 4, 33, 3), "width": 20},
        {"biased": (0, 2)},
        {"biased": (0, 1, 2), "width": (8, 0, 0), "frozen": (1, 3)},
        {"biased": (1, 2), "frozen": tuple(range(7)), "shape": (2, 9, 5, 4)},
    ],
    ids=str,
)
def test_unusual_blocks(backend: str, checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    small = min(options.get("shape", (2, 2, 2, 2))[2:]) < 2
    check(make_block(tail="avgpool" if small else "transition", **options), checkpoint)
    check(make_block(**options), checkpoint)


@pytest.mark.parametrize("tail", TAILS)
def test_wide_rows_with_padding_between_them(backend: str, tail: str | None) -> None:
    # 512 float64 channels are 4,096 bytes, the pitch that the buffer avoids.
    block = make_block((1, 500, 4, 3), (6, 6), tail)
    for checkpoint in CHECKPOINT_MODES:
        check(block, checkpoint)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_any_memory_format_of_the_input_and_of_the_gradient(
    backend: str, checkpoint: Checkpoint
) -> None:
    block = make_block(tail="transition")
    other = block.copy()
    exact = gradients(plain(other), other.leaves())
    wide = torch.zeros(2, 12, 6, 7, dtype=torch.float64, device=device())
    wide[:, 1:11:2] = block.input.detach()
    for input in (
        block.input.detach().contiguous(memory_format=torch.channels_last),
        block.input.detach().transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, 1:11:2],
    ):
        block.input = input.requires_grad_()
        actual = gradients(run(block, checkpoint), block.leaves())
        assert_equal(actual, exact, 1e-11)
        assert actual[0].is_contiguous(memory_format=torch.channels_last)
    # sum() sends back an expanded gradient without strides of its own.
    ones = torch.autograd.grad(run(block, checkpoint).sum(), block.leaves())
    assert_equal(ones, torch.autograd.grad(plain(block).sum(), block.leaves()), 1e-11)


def test_single_pixel_images(backend: str) -> None:
    for checkpoint in CHECKPOINT_MODES:
        check(make_block((3, 4, 1, 1), tail="avgpool"), checkpoint)
        check(make_block((1, 4, 1, 1), frozen=range(9)), checkpoint)


def test_one_value_per_channel_is_batch_norms_own_error(backend: str) -> None:
    block = make_block((1, 5, 1, 1), frozen=(0,))
    before = block.buffers()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        run(block)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        plain(block.copy())
    assert str(ours.value) == str(theirs.value)
    assert_equal(block.buffers(), before, 0)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_momentum(backend: str, momentum: float | None) -> None:
    block = make_block(tail="transition")
    block.layers = [
        layer._replace(norm1=layer.norm1._replace(momentum=momentum)) for layer in block.layers
    ]
    check(block, "bottleneck")


def test_norms_without_running_statistics(backend: str) -> None:
    block = make_block(tail="avgpool")

    def bare(layer: LayerSpec) -> LayerSpec:
        norm2 = layer.norm2._replace(running_mean=None, running_var=None)
        return layer._replace(norm2=norm2)

    block.layers = [bare(layer) for layer in block.layers]
    check(block, "block")


def margin_block(tail: str | None) -> tuple[Block, Block]:
    """A float32 block and its float64 twin whose ReLUs no rounding error switches."""
    for seed in range(100):
        block = make_block((2, 6, 7, 5), (4, 4, 4), tail, dtype=torch.float32, seed=seed)
        normalised: list[Tensor] = []
        exact = block.copy(torch.float64)
        copy = exact.copy()
        plain_block(copy.input, copy.layers, copy.tail, normalised=normalised)
        if min(float(values.detach().abs().min()) for values in normalised) > 1e-4:
            return block, exact
    raise AssertionError("no block keeps away from 0")


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_float32_is_as_precise_as_plain_pytorch(
    backend: str, checkpoint: Checkpoint, tail: str | None
) -> None:
    ours, exact = margin_block(tail)
    theirs = ours.copy()
    results = [
        (block, [output.detach(), *gradients(output, block.leaves()), *block.buffers()])
        for block, output in ((ours, run(ours, checkpoint)), (theirs, plain(theirs)))
    ]
    output = plain(exact)
    truth = [output.detach(), *gradients(output, exact.leaves()), *exact.buffers()]

    def error(values: list[Tensor]) -> float:
        errors = [
            float((value - right).norm() / right.norm())
            for value, right in zip(values, truth, strict=True)
        ]
        return max(errors)

    eps = torch.finfo(torch.float32).eps
    assert error(results[0][1]) <= 2 * error(results[1][1]) + 8 * eps


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES, indirect=["backend"], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_half_types_train(backend: str, dtype: torch.dtype, tail: str | None) -> None:
    worst: list[float] = []
    for seed in range(5):
        block = make_block((4, 6, 7, 5), (4, 4), tail, dtype=dtype, seed=seed)
        exact = block.copy(torch.float64)
        output, truth = run(block), plain(exact)
        error = (output.detach() - truth.detach()).norm() / truth.detach().norm()
        assert float(error) < 8 * torch.finfo(dtype).eps
        actual = gradients(output, block.leaves())
        assert all(gradient.dtype == dtype for gradient in actual)
        pairs = zip(actual, gradients(truth, exact.leaves()), strict=True)
        worst.append(
            min(
                float(F.cosine_similarity(one.double().flatten(), other.flatten(), dim=0))
                for one, other in pairs
            )
        )
    # A switched ReLU moves a gradient by a whole term: the direction is what is certain, mostly.
    assert statistics.median(worst) > 0.97


@pytest.mark.filterwarnings("ignore:densenet_fast runs its reference")
def test_autocast_computes_in_its_own_type_and_gradients_keep_theirs() -> None:
    block = make_block((4, 6, 7, 5), tail="transition", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, other = run(block), plain(block.copy())
    assert output.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), other.float(), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(output, block.leaves())
    assert all(gradient.dtype == torch.float32 for gradient in actual)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(2, 9), st.integers(2, 9)),
    growths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    width=st.integers(1, 40),
    tail=st.sampled_from(TAILS),
    checkpoint=st.sampled_from(CHECKPOINT_MODES),
    frozen=st.sets(st.integers(0, 10)),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_block(
    name: str,
    shape: tuple[int, int, int, int],
    growths: list[int],
    width: int,
    tail: str | None,
    checkpoint: Checkpoint,
    frozen: set[int],
    seed: int,
) -> None:
    with on(name):  # type: ignore[arg-type]
        block = make_block(
            shape, growths, tail, width=width, frozen=tuple(frozen), eps=(1e-3, 1e-2), seed=seed
        )
        check(block, checkpoint, tolerance=1e-9)


WRONG = {
    "rank": (lambda b: {"input": b.input[0]}, ValueError, "four dimensions"),
    "integers": (lambda b: {"input": b.input.int()}, TypeError, "floating-point"),
    "empty": (lambda b: {"input": b.input[:0]}, ValueError, "at least one image"),
    "channels": (lambda b: {"input": b.input[:, :4]}, ValueError, r"norm1.weight .* \(4,\)"),
    "dtype": (lambda b: {"input": b.input.float()}, TypeError, "type of the input"),
    "device": (lambda b: {"input": b.input.to("meta")}, ValueError, "input's device"),
    "small": (lambda b: {"input": b.input[:, :, :1]}, ValueError, "at least 2x2 pixels"),
    "mode": (lambda b: {"checkpoint": "all"}, ValueError, "'none', 'bottleneck', 'block', got"),
    "dropout": (
        lambda b: {"layers": [*b.layers[:2], b.layers[2]._replace(dropout=1.5)]},
        ValueError,
        "layer 3: dropout",
    ),
    "conv": (
        lambda b: {"layers": [b.layers[0], b.layers[1]._replace(conv2_weight=b.input)]},
        ValueError,
        "layer 2: conv2.weight",
    ),
    "tail": (lambda b: {"tail": "transition"}, TypeError, "got str"),
    "frozen": (
        lambda b: {
            "layers": [
                b.layers[0],
                b.layers[1]._replace(
                    norm1=b.layers[1].norm1._replace(batch_statistics=False, running_mean=None)
                ),
            ]
        },
        ValueError,
        "layer 2: norm1 should have running statistics",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_an_error_and_changes_nothing(backend: str, wrong: str) -> None:
    block = make_block(tail="transition")
    change, error, words = WRONG[wrong]
    before = block.buffers()
    arguments = {"input": block.input, "layers": block.layers, "tail": block.tail}
    with pytest.raises(error, match=words):
        dense_block(**{**arguments, **change(block)})
    assert_equal(block.buffers(), before, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_pass_as_in_plain_pytorch(backend: str, value: float) -> None:
    for frozen in ((), tuple(range(9))):
        block = make_block(tail="transition", frozen=frozen)
        with torch.no_grad():
            block.input[1, 2, 3, 4] = value
        other = block.copy()
        output, exact = run(block), plain(other)
        assert torch.equal(output.isfinite(), exact.isfinite())
        assert all(
            torch.equal(one.isfinite(), two.isfinite())
            for one, two in zip(block.buffers(), other.buffers(), strict=True)
        )
