"""Sharded parameters: FSDP2 and DTensors around and inside fused blocks, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import Recorder, networks
from processes import needs_gloo, run_on_ranks
from torch import Tensor, nn

from densenet_fast import fusion_report
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.modules.layers import DenseBlock, DenseLayer

pytestmark = needs_gloo

PART = 2  # images of a rank
STEPS = 2
TOLERANCE = 1e-9


def shard_blocks(network: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in network.features:
        if isinstance(part, DenseBlock):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_layers(network: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in list(network.modules()):
        if isinstance(part, DenseLayer):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_whole(network: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(network, mesh=mesh)


def shard_blocks_that_checkpoint(network: nn.Module, mesh: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointWrapper,
        apply_activation_checkpointing,
    )
    from torch.distributed.fsdp import fully_shard

    apply_activation_checkpointing(network, check_fn=lambda part: isinstance(part, DenseBlock))
    for part in network.features:
        if isinstance(part, CheckpointWrapper):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


@dataclass
class Case:
    """How parameters are sharded, and how many layers each fused node then has.

    A sharded block is called as a module, which gathers its parameters first; so it, the transition
    behind it and the final norm are nodes of their own.
    """

    shard: Callable[[nn.Module, Any], None]
    runs: list[int]
    mode: str = "bottleneck"
    again: int = 0  # nodes that the backward runs once more


CASES = [
    *(Case(shard_blocks, [2, 0, 3, 0, 2, 0], mode) for mode in CHECKPOINT_MODES),
    Case(shard_layers, [1, 1, 0, 1, 1, 1, 0, 1, 1, 0]),
    Case(shard_whole, [2, 3, 2]),
    Case(shard_blocks_that_checkpoint, [2, 0, 3, 0, 2, 0], again=3),
]


def near(actual: Tensor, expected: Tensor, what: str, floor: float = 0.0) -> None:
    error = float((actual - expected).detach().double().norm())
    size = max(float(expected.detach().double().norm()), floor)
    assert error <= TOLERANCE * size, f"{what}: error {error:.3e} against norm {size:.3e}"


def train(case: Case, mesh: Any) -> None:
    """Two steps of SGD, the norms synchronised, against torchvision's in one process."""
    expected, ours = networks(checkpoint=case.mode)
    nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    case.shard(ours, mesh)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (expected, ours)]
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        images = torch.randn(2 * PART, 3, 32, 32, generator=generator, dtype=torch.float64)
        wanted = expected(images)
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch)
            output = ours(images.split(PART)[dist.get_rank()])
            assert recorder.runs == case.runs, case
            near(output, wanted.split(PART)[dist.get_rank()], f"output of step {step}, {case}")
            for optimizer, result in zip(optimizers, (wanted, output), strict=True):
                optimizer.zero_grad()
                (result - 1).square().mean().backward()
            assert len(recorder.runs) == len(case.runs) + case.again, case
        theirs = dict(expected.named_parameters())
        largest = max(float(parameter.grad.norm()) for parameter in theirs.values())
        for name, parameter in ours.named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "")
            gradient = parameter.grad.full_tensor()
            near(gradient, theirs[name].grad, f"gradient of {name}, {case}", 1e-3 * largest)
        for optimizer in optimizers:
            optimizer.step()
    if not case.again:  # a checkpoint's second forward updates running statistics again
        buffers = dict(expected.named_buffers())
        for name, buffer in ours.named_buffers():
            near(buffer, buffers[name], f"{name}, {case}", 1e-3)


def mixed_precision(mesh: Any) -> None:
    """Autocast around sharded blocks: bfloat16 inside, gradients of float32."""
    ours = networks(torch.float32)[1]
    shard_blocks(ours, mesh)
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(torch.randn(PART, 3, 32, 32))
    output.float().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.full_tensor().isfinite().all(), name


def distributed_tensors(mesh: Any) -> None:
    """Parameters that are DTensors when a forward looks at them go to the plain modules."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    expected, ours = networks(torch.float64)
    distribute_module(ours, mesh)
    assert not any(row.fused for row in fusion_report(ours))
    images = torch.ones(PART, 3, 32, 32, dtype=torch.float64)
    output = ours(distribute_tensor(images, mesh, [Replicate()]))
    assert isinstance(output, DTensor)
    near(output.full_tensor(), expected(images), "output of DTensors")
    with pytest.raises(RuntimeError, match="got mixed"):
        ours(images)  # PyTorch's own words


def every_case() -> None:
    """What a rank does."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in CASES:
        train(case, mesh)
    mixed_precision(mesh)
    distributed_tensors(mesh)


@pytest.mark.slow
def test_two_ranks_like_one_process() -> None:
    run_on_ranks(every_case)
