"""DistributedDataParallel over fused blocks: two ranks against torchvision's in one process.

Two steps of SGD; then outputs, parameters (and so the gradients) and running statistics agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import Recorder, networks
from processes import needs_gloo, run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densenet_fast import fusion_report
from densenet_fast.blocks.specs import CHECKPOINT_MODES

pytestmark = needs_gloo

STEPS = 2
MICRO_BATCHES = 2
PART = 2  # images of a rank


@dataclass
class Case:
    """One way to train."""

    mode: str = "bottleneck"
    synchronised: bool = True
    accumulate: bool = False
    unused: bool = False
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    case
    for synchronised in (True, False)
    for case in (
        *(Case(mode, synchronised) for mode in CHECKPOINT_MODES),
        *(Case(mode, synchronised, dtype=torch.float32) for mode in CHECKPOINT_MODES),
        Case("block", synchronised, accumulate=True),
        Case("none", synchronised, unused=True, options={"find_unused_parameters": True}),
        Case("bottleneck", synchronised, options={"static_graph": True}),
        Case("block", synchronised, options={"gradient_as_bucket_view": True}),
    )
]


class WithSpare(nn.Module):
    """A network beside a module that no forward reads."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.spare = nn.Linear(2, 2).to(network.classifier.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return self.network(input)


def batches(dtype: torch.dtype) -> list[list[Tensor]]:
    """For every step the micro-batches of all ranks together."""
    generator = torch.Generator().manual_seed(4)
    size = (2 * PART, 3, 32, 32)
    return [
        [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
        for _ in range(STEPS)
    ]


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def train_alone(network: nn.Module, case: Case) -> tuple[list[Tensor], nn.Module]:
    """All ranks' work in one process; outputs, and the network as rank 0 should have it."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    outputs = []
    for micro_batches in batches(case.dtype):
        optimizer.zero_grad()
        for images in micro_batches if case.accumulate else micro_batches[:1]:
            if case.synchronised:
                output = network(images)
                loss_of(output).backward()
            else:  # each rank takes the statistics of its part, and rank 0's are those that stay
                kept, halves = [], []
                for part in images.split(PART):
                    halves.append(network(part))
                    (loss_of(halves[-1]) / 2).backward()
                    kept.append([buffer.clone() for buffer in network.buffers()])
                output = torch.cat(halves)
                for buffer, first in zip(network.buffers(), kept[0], strict=True):
                    buffer.copy_(first)
            outputs.append(output.detach())
        optimizer.step()
    return outputs, network


def train_by_ranks(network: nn.Module, case: Case) -> list[Tensor]:
    """The outputs of the images of this rank."""
    module = WithSpare(network) if case.unused else network
    wrapped = DistributedDataParallel(module, **case.options)
    if case.synchronised:
        # DistributedDataParallel refuses networks on CPUs that have SyncBatchNorm when made.
        nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    outputs = []
    for micro_batches in batches(case.dtype):
        optimizer.zero_grad()
        used = micro_batches if case.accumulate else micro_batches[:1]
        for number, images in enumerate(used):
            last = number == len(used) - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                output = wrapped(images.split(PART)[dist.get_rank()])
                loss_of(output).backward()
            outputs.append(output.detach())
        optimizer.step()
    assert fusion_report(network).all_fused
    return outputs


def assert_near(actual: Tensor, expected: Tensor, what: str, case: Case, floor: float = 0) -> None:
    # 18 norms, each of which takes sums over the batch; rounding grows with their number.
    bound = 1e-9 if case.dtype == torch.float64 else 18 * 64 * torch.finfo(torch.float32).eps
    error = float((actual - expected).detach().double().norm())
    size = max(float(expected.detach().double().norm()), floor)
    assert error <= bound * size, f"{what}, {case}: error {error:.3e} against norm {size:.3e}"


def every_case(cases: Sequence[Case]) -> None:
    """What a rank does."""
    for case in cases:
        expected, ours = networks(case.dtype, checkpoint=case.mode)
        wanted, expected = train_alone(expected, case)
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch)
            outputs = train_by_ranks(ours, case)
            assert recorder.runs == [2, 3, 2] * len(outputs), case
        for number, (output, whole) in enumerate(zip(outputs, wanted, strict=True)):
            part = whole.split(PART)[dist.get_rank()]
            assert_near(output, part, f"output {number}", case)
        parameters = dict(expected.named_parameters())
        for name, parameter in ours.named_parameters():
            assert_near(parameter, parameters[name], name, case)
            assert_near(parameter.grad, parameters[name].grad, f"gradient of {name}", case, 1e-3)
        if case.synchronised or dist.get_rank() == 0:
            buffers = dict(expected.named_buffers())
            for name, buffer in ours.named_buffers():
                assert_near(buffer, buffers[name], name, case, 1e-3)


@pytest.mark.slow
def test_two_ranks_like_one_process() -> None:
    run_on_ranks(every_case, CASES)


def test_data_parallel_without_devices() -> None:
    """It calls the network as it is."""
    expected, ours = networks()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    output = nn.DataParallel(ours)(images)
    torch.testing.assert_close(output, expected(images), rtol=1e-9, atol=1e-12)
