"""Bytes kept between forward and backward: exactly what each mode promises, linear in depth."""

from __future__ import annotations

import pytest
import torch
from block_cases import TAILS, Block, make_block
from torch import Tensor

from densenet_fast.blocks import backward, forward
from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.operators.rows import Scratch, empty_rows

SHAPE = (2, 8, 16, 16)
ROWS = 2 * 16 * 16
GROWTH, WIDTH = 4, 16
FLOAT = 4  # bytes


def block_of(depth: int, tail: str | None) -> Block:
    return make_block(SHAPE, [GROWTH] * depth, tail, width=WIDTH, dtype=torch.float32)


def kept(block: Block, checkpoint: Checkpoint) -> tuple[dict[int, int], Tensor]:
    """Storages that the forward saves, parameters aside, by address with their bytes."""
    saved: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
    return saved, output


def promised(depth: int, checkpoint: Checkpoint) -> int:
    channels = SHAPE[1]
    if checkpoint != "block":
        channels += depth * GROWTH
    if checkpoint == "none":
        channels += depth * WIDTH
    return ROWS * channels * FLOAT


def vectors(depth: int) -> int:
    """Mean and variance of each channel of the features and the bottlenecks, and one scalar."""
    return (2 * (SHAPE[1] + depth * (GROWTH + WIDTH)) + 1) * FLOAT


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("depth", [1, 3, 6, 12])
def test_exactly_the_promised_bytes_are_kept(
    backend: str, checkpoint: Checkpoint, tail: str | None, depth: int
) -> None:
    block = block_of(depth, tail)
    saved, output = kept(block, checkpoint)
    assert sum(saved.values()) == promised(depth, checkpoint) + vectors(depth)
    assert (block.input.untyped_storage().data_ptr() in saved) == (checkpoint == "block")
    shares = output.untyped_storage().data_ptr() in saved
    assert shares == (tail is None and checkpoint != "block")


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_growth_with_depth_is_linear(checkpoint: Checkpoint) -> None:
    sizes = [sum(kept(block_of(depth, "avgpool"), checkpoint)[0].values()) for depth in (4, 8, 12)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]


def test_nothing_is_kept_without_gradients(backend: str) -> None:
    for tail in TAILS:
        block = block_of(3, tail)
        with torch.no_grad():
            assert not kept(block, "none")[0]
        for leaf in block.leaves():
            leaf.requires_grad_(False)
        assert not kept(block, "none")[0]


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_the_node_holds_no_tensors_besides_the_saved_ones(checkpoint: Checkpoint) -> None:
    block = block_of(3, "avgpool")
    _, output = kept(block, checkpoint)
    seen: set[int] = set()

    def search(item: object) -> None:
        assert not isinstance(item, Tensor)
        if id(item) in seen or not hasattr(item, "__dict__"):
            if isinstance(item, list | tuple):
                for part in item:
                    search(part)
            return
        seen.add(id(item))
        for part in vars(item).values():
            search(part)

    for part in vars(output.grad_fn).values():
        search(part)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_one_gradient_buffer_and_one_scratch_of_each_kind(
    backend: str, checkpoint: Checkpoint, tail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    buffers: list[int] = []

    class Counting(Scratch):
        def __init__(self, pixels: tuple[int, int, int], channels: int, like: Tensor) -> None:
            super().__init__(pixels, channels, like)
            taken.append(channels)

    original = backward.empty_channels_last

    def empty(shape: tuple[int, int, int, int], like: Tensor, pitch: int | None = None) -> Tensor:
        buffers.append(shape[1])
        return original(shape, like, pitch)

    depth = 5
    block = block_of(depth, tail)
    output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)

    def rows(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
        taken.append(shape[3])
        return empty_rows(shape, like)

    monkeypatch.setattr(backward, "empty_rows", rows)
    monkeypatch.setattr(forward, "Scratch", Counting)
    monkeypatch.setattr(backward, "empty_channels_last", empty)
    output.sum().backward()
    recomputed = [] if checkpoint == "none" else [WIDTH]
    again = [WIDTH] if checkpoint == "block" else []
    assert sorted(filter(None, taken)) == sorted([WIDTH, GROWTH, *recomputed, *again])
    assert buffers == [SHAPE[1] + depth * GROWTH, SHAPE[1]]


def test_in_place_gradients_need_not_copy_and_are_owned() -> None:
    block = block_of(2, "transition")
    output = dense_block(block.input, block.layers, tail=block.tail)
    output.sum().backward()
    for leaf in block.leaves():
        assert leaf.grad is not None
        assert leaf.grad.untyped_storage().nbytes() == leaf.grad.numel() * FLOAT
