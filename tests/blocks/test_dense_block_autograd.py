"""The dense block as a citizen of autograd: what is needed, when, how often, and what is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from block_cases import TAILS, Block, gradients, make_block
from devices import device
from plain_block import plain_block
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.operators import reference, reference_block


def run(block: Block, checkpoint: Checkpoint = "bottleneck") -> Tensor:
    return dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)


def plain(block: Block) -> Tensor:
    return plain_block(block.input, block.layers, block.tail)


def assert_gradients(actual: list[Tensor], exact: list[Tensor]) -> None:
    for one, other in zip(actual, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("tail", "checkpoint"), zip(TAILS, itertools.cycle(CHECKPOINT_MODES), strict=False)
)
@pytest.mark.parametrize("frozen", [(), (0, 3, 4)], ids=["batch", "frozen"])
def test_gradcheck(
    backend: str, checkpoint: Checkpoint, tail: str | None, frozen: tuple[int, ...]
) -> None:
    """Every tail and mode once: the next test has all of them, against autograd."""
    block = make_block((2, 2, 3, 2), (1, 2), tail, width=2, frozen=frozen, seed=3)

    def output(*leaves: Tensor) -> Tensor:
        return run(block, checkpoint)

    # Finite differences run the forward often: running statistics drift, and must not matter.
    torch.autograd.gradcheck(output, block.leaves(), eps=1e-7, atol=1e-5, rtol=1e-4)


def subsets(count: int) -> list[tuple[int, ...]]:
    """Each tensor alone, each left out, and neighbours in pairs."""
    alone = [(index,) for index in range(count)]
    others = [tuple(j for j in range(count) if j != index) for index in range(count)]
    return alone + others + list(itertools.pairwise(range(count)))


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_any_subset_of_tensors_may_require_gradients(
    backend: str, checkpoint: Checkpoint, tail: str | None
) -> None:
    block = make_block(growths=(3, 4), tail=tail, frozen=(2,))
    every = [block.input, *block.parameters()]
    other = block.copy()
    exact = gradients(plain(other), other.leaves())
    for subset in subsets(len(every)):
        for index, tensor in enumerate(every):
            tensor.requires_grad_(index in subset)
        actual = gradients(run(block, checkpoint), block.leaves())
        assert_gradients(actual, [exact[index] for index in subset])


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        # The last layer's conv2 alone: one weight gradient and no other work.
        (["2.conv2"], {"conv3x3_backward": "weight"}),
        (["2.norm2"], {"conv3x3_backward": "sums"}),
        (["2.conv1"], {"conv3x3_backward": "all but weight", "conv1x1_backward": "weight"}),
        (["2.norm1"], {"conv3x3_backward": "all but weight", "conv1x1_backward": "sums"}),
    ],
    ids=lambda value: "+".join(value),
)
def test_only_the_work_that_is_needed_is_done(
    backend: str, needed: list[str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make_block()
    names = {}
    for index, layer in enumerate(block.layers):
        names[f"{index}.norm1"] = layer.norm1.weight
        names[f"{index}.conv1"] = layer.conv1_weight
        names[f"{index}.norm2"] = layer.norm2.weight
        names[f"{index}.conv2"] = layer.conv2_weight
    for tensor in block.leaves():
        tensor.requires_grad_(False)
    for name in needed:
        names[name].requires_grad_()
    output = run(block)
    calls: dict[str, str] = {}
    # The compiled loop does what the definition does with the same arguments.
    monkeypatch.setattr(operators, "dense_block_backward_", reference_block.dense_block_backward_)
    for name in ("conv1x1_backward", "conv3x3_backward", "finish_gradient"):
        monkeypatch.setattr(reference, name, _recorder(calls, name))
    gradients(output, block.leaves())
    assert calls == expected


def _recorder(calls: dict[str, str], name: str) -> Any:
    kinds = {
        (True, True, True): "all but weight",
        (False, True, True): "sums",
        (False, False, False): "weight",
    }
    original = getattr(reference, name)

    def record(*arguments: Any) -> None:
        assert name not in calls, "work below the lowest layer that needs any"
        *_, data, gamma, beta, weight = (a for a in arguments if not isinstance(a, bool))
        kind = kinds[data is not None, gamma is not None, beta is not None]
        assert (weight is not None) == (kind == "weight")
        calls[name] = kind
        original(*arguments)

    return record


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_two_backwards_over_a_retained_graph(backend: str, checkpoint: Checkpoint) -> None:
    block = make_block(tail="transition")
    output = run(block, checkpoint)
    first = torch.autograd.grad(output.square().sum(), block.leaves(), retain_graph=True)
    second = torch.autograd.grad(output.square().sum(), block.leaves())
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output.sum(), block.leaves())


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_several_forwards_before_their_backwards(backend: str, checkpoint: Checkpoint) -> None:
    block, other = make_block(tail="transition"), make_block(tail="transition")
    inputs = [torch.randn(2, 5, 6, 7, dtype=torch.float64, device=device()) for _ in range(3)]
    results: list[list[Tensor]] = []
    for function, target in ((lambda b: run(b, checkpoint), block), (plain, other)):
        outputs = []
        for input in inputs:
            target.input = input
            outputs.append(function(target))
        for output in reversed(outputs):
            output.square().sum().backward()
        results.append([leaf.grad for leaf in target.parameters()])
        results[-1] += target.buffers()
    assert_gradients(*results)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_a_block_behind_itself(backend: str, checkpoint: Checkpoint) -> None:
    block = make_block((2, 5, 6, 7), (3, 3), "transition")  # 11 channels become 6: cut to 5
    other = block.copy()
    results = []
    for function, target in ((lambda b: run(b, checkpoint), block), (plain, other)):
        first = function(target)
        leaf, target.input = target.input, first[:, :5]
        results.append(gradients(function(target), [leaf, *target.parameters()]))
    assert_gradients(*results)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_second_derivatives_are_a_clear_error(
    backend: str, checkpoint: Checkpoint, tail: str | None
) -> None:
    block = make_block(tail=tail)
    words = "a fused dense block cannot be differentiated twice"
    loss = run(block, checkpoint).square().sum()
    first = torch.autograd.grad(loss, block.leaves(), create_graph=True)
    exact = torch.autograd.grad(plain(block).square().sum(), block.leaves())
    assert_gradients(list(first), list(exact))
    for gradient in first:
        with pytest.raises(RuntimeError, match=words):
            gradient.sum().backward(retain_graph=True)
        for leaf in block.leaves():
            with pytest.raises(RuntimeError, match=words):
                torch.autograd.grad(gradient.sum(), leaf, retain_graph=True, allow_unused=True)


def test_writing_into_the_output_is_noticed(backend: str) -> None:
    for checkpoint in ("none", "bottleneck"):
        block = make_block()
        output = run(block, checkpoint)
        changed = output.relu_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            changed.sum().backward()


def test_writing_into_what_block_mode_recomputes_from_is_noticed(backend: str) -> None:
    block = make_block(tail="avgpool")
    block.input = block.input.detach() * 1
    output = run(block, "block")
    block.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_optimiser_step_before_the_backward_is_noticed(backend: str) -> None:
    block = make_block(tail="avgpool")
    output = run(block)
    with torch.no_grad():
        block.layers[0].conv1_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("tail", TAILS)
def test_without_gradients_there_is_no_node(backend: str, tail: str | None) -> None:
    block = make_block(tail=tail)
    exact = plain(block.copy())
    with torch.no_grad():
        output = run(block)
    assert output.grad_fn is None
    torch.testing.assert_close(output, exact.detach(), rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        assert not run(block).requires_grad
    for leaf in block.leaves():
        leaf.requires_grad_(False)
    assert run(block).grad_fn is None


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_hooks_on_saved_tensors_see_and_may_move_them(backend: str, checkpoint: Checkpoint) -> None:
    block = make_block((1, 500, 4, 3), (6, 6), tail="transition")
    other = block.copy()
    # Like save_on_cpu: what comes back has the same values in plain contiguous memory.
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format),
        lambda tensor: tensor,
    ):
        output = run(block, checkpoint)
    assert_gradients(gradients(output, block.leaves()), gradients(plain(other), other.leaves()))
