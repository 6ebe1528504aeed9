"""CUDA graphs, streams, several devices and lack of memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from block_cases import TAILS, Block, gradients, make_block
from comparison import SMALL, assert_close, networks, step
from devices import captured, device, on
from ops_arguments import ARGUMENTS, arguments, tensors
from test_bad_input import MODULES, refuses
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock
from densenet_fast.operators.backends import use_backend

pytestmark = pytest.mark.cuda
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with on("cuda"):
        yield


def several_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


# ---- Graphs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_operators_in_a_graph(op: str, dtype: torch.dtype) -> None:
    given, fresh = arguments(op, dtype), arguments(op, dtype)
    run = getattr(operators, op)
    graph = captured(lambda: run(*given.values()))
    results = dict(tensors(given))
    for _ in range(2):
        for name, value in tensors(fresh):  # some operators accumulate
            results[name].copy_(value)
        graph.replay()
    run(*fresh.values())
    for name, value in tensors(fresh):
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
def test_blocks_in_a_graph(dtype: torch.dtype, checkpoint: Checkpoint, tail: str | None) -> None:
    block = make_block((2, 20, 9, 7), (12,) * 3, tail, width=48, dtype=dtype)
    found: list[Tensor] = []

    def run() -> None:
        output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
        factors = torch.ones_like(output)
        found[:] = [output.detach(), *torch.autograd.grad(output, block.leaves(), factors)]

    graph = captured(run)
    for seed in (1, 2):
        fresh = make_block((2, 20, 9, 7), (12,) * 3, tail, width=48, dtype=dtype, seed=seed)
        overwrite(block, fresh)
        graph.replay()
        output = dense_block(fresh.input, fresh.layers, tail=fresh.tail, checkpoint=checkpoint)
        factors = torch.ones_like(output)
        expected = [output.detach(), *torch.autograd.grad(output, fresh.leaves(), factors)]
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one, two)
        for one, two in zip(block.buffers(), fresh.buffers(), strict=True):
            assert torch.equal(one, two)


def overwrite(block: Block, fresh: Block) -> None:
    """The values of one block into the tensors of another."""
    pairs = list(zip(block.leaves(), fresh.leaves(), strict=True))
    for one, two in zip(block.norms(), fresh.norms(), strict=True):
        assert one.running_mean is not None and two.running_mean is not None
        assert one.running_var is not None and two.running_var is not None
        pairs += [(one.running_mean, two.running_mean), (one.running_var, two.running_var)]
    with torch.no_grad():
        for to, value in pairs:
            to.copy_(value)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_a_training_step_in_a_graph(checkpoint: Checkpoint) -> None:
    _, network = networks(checkpoint=checkpoint)
    state = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, device=device())
    loss = torch.empty((), dtype=torch.float64, device=device())

    def run() -> None:
        network.zero_grad(set_to_none=True)
        value = network(images).square().sum()
        value.backward()
        loss.copy_(value.detach())

    graph = captured(run)
    network.load_state_dict(state)
    eager = copy.deepcopy(network)
    for _ in range(3):
        images.copy_(torch.randn_like(images))
        graph.replay()
        eager.zero_grad()
        value = eager(images).square().sum()
        value.backward()
        assert_close(loss, value.detach(), "loss")
        theirs = dict(eager.named_parameters())
        for name, parameter in network.named_parameters():
            assert_close(parameter.grad, theirs[name].grad, name, floor=1.0)
        buffers = dict(eager.named_buffers())
        for name, buffer in network.named_buffers():
            assert_close(buffer, buffers[name], name)


# ---- Streams and devices


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_work_runs_on_the_current_stream(checkpoint: Checkpoint) -> None:
    """The input comes late on a side stream: who works on another one reads something else."""
    block = make_block((2, 20, 9, 7), (12,) * 3, "transition", width=48, dtype=torch.float32)
    other = block.copy()
    values = block.input.detach().clone()
    output = dense_block(other.input, other.layers, tail=other.tail, checkpoint=checkpoint)
    expected = [output.detach(), *gradients(output, other.leaves()), *other.buffers()]
    with torch.no_grad():
        block.input.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        with torch.no_grad():
            block.input.copy_(values)
        output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
        found = [output.detach(), *gradients(output, block.leaves()), *block.buffers()]
    side.synchronize()
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_nothing_waits_for_the_gpu() -> None:
    """No synchronisation and no copy to the host in a training step."""
    network = EfficientDenseNet(**SMALL).to(device())
    images = torch.randn(2, 3, 32, 32, device=device())
    network(images).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_device_than_the_current_one() -> None:
    several_devices()
    block = make_block((2, 20, 9, 7), (12,) * 3, "transition", width=48, dtype=torch.float32)
    network = EfficientDenseNet(**SMALL).to("cuda:1")
    with torch.cuda.device(1):
        here = network(torch.ones(2, 3, 32, 32, device="cuda:1"))
    output = network(torch.ones(2, 3, 32, 32, device="cuda:1"))
    output.sum().backward()
    assert torch.cuda.current_device() == 0
    assert output.device == torch.device("cuda:1")
    torch.testing.assert_close(output, here)
    assert dense_block(block.input, block.layers).device == torch.device("cuda:0")


@pytest.mark.parametrize("name", MODULES)
def test_input_and_module_on_different_devices(name: str) -> None:
    make, size = MODULES[name]
    images = torch.randn(size)
    with use_backend("auto"):
        refuses(make().to(device()), images, ValueError, "input is on cpu, but .* is on cuda:0")
        refuses(make(), images.to(device()), ValueError, "input is on cuda:0, but .* is on cpu")


# ---- Lack of memory

MIB = 2**20


def reserve_no_more_than(limit: float) -> None:
    total = torch.cuda.get_device_properties(device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_no_memory_at_any_point_of_a_backward(checkpoint: Checkpoint) -> None:
    """Each time PyTorch's own error, nothing changed by it, and the next step is right."""
    block = DenseBlock(6, 64, 4, 32, 0.0, checkpoint=checkpoint).to(device())
    state = copy.deepcopy(block.state_dict())
    images = torch.randn(4, 64, 56, 56, device=device())

    def start() -> Tensor:
        block.load_state_dict(state)
        block.zero_grad(set_to_none=True)
        return block(images).square().sum()

    start().backward()
    expected = [parameter.grad for parameter in block.parameters()]
    failures = 0
    for extra in range(0, 4096, 8):
        loss = start()
        torch.cuda.empty_cache()
        after = copy.deepcopy(block.state_dict())
        reserve_no_more_than(torch.cuda.memory_reserved() + extra * MIB)
        try:
            loss.backward()
            break
        except torch.OutOfMemoryError:
            failures += 1
        finally:
            reserve_no_more_than(torch.inf)
        for name, value in block.state_dict().items():
            assert torch.equal(value, after[name]), name
        del loss, after
    else:
        pytest.fail("the backward needs more than 4 GiB")
    assert failures > 1
    for parameter, grad in zip(block.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_no_memory_for_a_forward() -> None:
    network = EfficientDenseNet(**SMALL).to(device())
    images = torch.randn(64, 3, 224, 224, device=device())
    torch.cuda.empty_cache()
    reserve_no_more_than(torch.cuda.memory_reserved())
    try:
        with pytest.raises(torch.OutOfMemoryError):
            network(images)
    finally:
        reserve_no_more_than(torch.inf)
    output, _ = step(network, images[:2])
    assert output.isfinite().all()
