"""Peak memory of one training step, each case in a child process of its own.

The child imports everything, builds the network, runs one whole step so that all that is
created lazily exists, and only then measures three steps:

* gradients allocated: every parameter has its gradient before the step, zeroed in place;
* gradients freed: the gradients were dropped (`set_to_none`) and the step creates them;
* a census of the bytes autograd saves, and of what stays resident after the forward pass.

Where the first figure is all that is asked for, it measures no other.

The malloc thresholds of the child make freed buffers leave the process at once, so that
the peak is that of live memory. This slows the child: times are measured elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.children import call_in_child
from benchmarks.measure import (
    MeasurementError,
    release_cached,
    sample_memory,
    saved_for_backward,
    tuned_libraries,
)
from benchmarks.networks import NetworkSpec

MALLOC_THRESHOLD = 65_536  # bytes
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(MALLOC_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": str(MALLOC_THRESHOLD),
}


@dataclass(frozen=True)
class MemoryCase:
    """What one child measures."""

    spec: NetworkSpec
    peer: str
    threads: int
    device: str = "cpu"
    seed: int = 0
    amp: str = "none"
    dtype: str = "float32"  # of parameters and images
    memory_budget: int | None = None  # bytes: densenet_fast with checkpoint="auto"
    peak_only: bool = False  # with gradients allocated; no other figure


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step; bytes. None: was not asked for."""

    peak_gradients_allocated: int
    peak_gradients_freed: int | None
    saved_for_backward: int | None
    resident_after_forward: int | None
    parameters: int


# What `--amp` calls a type of autocast → the type.
AMP = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Autocast of a forward in the type of that name; "none": without."""
    dtype = AMP[amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def training_step(model: nn.Module, images: Tensor, labels: Tensor, amp: str = "none") -> Tensor:
    """Forward, cross entropy and backward; returns the loss."""
    with autocast(images.device, amp):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def make_batch(
    spec: NetworkSpec, memory_format: torch.memory_format, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Random images of the network's size, and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(spec.input_shape, generator=generator)
    labels = torch.randint(spec.num_classes, spec.label_shape, generator=generator)
    return images.to(device).contiguous(memory_format=memory_format), labels.to(device)


def measure_case(case: MemoryCase) -> StepMemory:
    """Measure one case in this process; `measure_in_child` does it in another."""
    from benchmarks.peers import PEERS, build, initial_state
    from densenet_fast import EfficientDenseNet

    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    peer = PEERS[case.peer]
    dtype: torch.dtype = getattr(torch, case.dtype)
    model = build(peer, case.spec, initial_state(case.spec, case.seed), device=device).to(dtype)
    if case.memory_budget is not None:
        assert isinstance(model, EfficientDenseNet)
        model.memory_budget = case.memory_budget
        model.checkpoint = "auto"
    images, labels = make_batch(case.spec, peer.layout(case.spec), device, case.seed)
    images = images.to(dtype)

    def step() -> None:
        training_step(model, images, labels, case.amp)

    def forward() -> Tensor:
        with autocast(device, case.amp):
            return nn.functional.cross_entropy(model(images), labels)

    with tuned_libraries(device):
        step()
        model.zero_grad(set_to_none=False)
        allocated = sample_memory(step, device)
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        figures = StepMemory(allocated.peak_above_rest, None, None, None, parameters)
        if case.peak_only:
            return figures
        model.zero_grad(set_to_none=True)
        freed = sample_memory(step, device)
        kept = sample_memory(forward, device)
        saved = saved_for_backward(model, forward, images)
    return replace(
        figures,
        peak_gradients_freed=freed.peak_above_rest,
        saved_for_backward=saved,
        resident_after_forward=kept.after - kept.before,
    )


def child(case: dict[str, Any]) -> dict[str, Any]:
    """The figures of a case, both as plain data."""
    spec = NetworkSpec.from_json(case.pop("spec"))
    return asdict(measure_case(MemoryCase(spec, **case)))


def measure_in_child(case: MemoryCase, timeout: float = 1800.0) -> StepMemory:
    """Measure one case in a process of its own, at most `timeout` seconds long."""
    figures = call_in_child(
        "benchmarks.memory:child",
        {"case": asdict(case)},
        threads=case.threads,
        environment=CHILD_ENVIRONMENT,
        timeout=timeout,
    )
    return StepMemory(**figures)


def figures_in_child(case: MemoryCase) -> dict[str, Any]:
    """The figures of `measure_in_child` as plain data, or as "error" why there are none."""
    release_cached(torch.device(case.device))
    try:
        return asdict(measure_in_child(case))
    except MeasurementError as error:
        return {"error": str(error)}
