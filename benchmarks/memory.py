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

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    MeasurementError,
    OutOfMemoryError,
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
# What Python's, PyTorch's CPU and its CUDA allocator say when there is no more.
OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "CUDA out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, OutOfMemoryError) or any(part in text for part in OUT_OF_MEMORY)


# The child sees exactly the modules that its parent sees.
BOOTSTRAP = (
    "import json, sys; request = json.loads(sys.argv[1]); sys.path[:] = request['path']; "
    "from benchmarks.memory import child_main; child_main(request)"
)


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


# Type of autocast → what `--amp` calls it.
AMP: dict[str, torch.dtype | None] = {
    "none": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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
    labels = torch.randint(spec.num_classes, (spec.batch_size,), generator=generator)
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
    images, labels = make_batch(case.spec, peer.memory_format, device, case.seed)
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


def child_main(request: dict[str, Any]) -> None:
    """Measure the case of a request and print its figures as the last line of output."""
    spec = NetworkSpec.from_json(request["case"].pop("spec"))
    print(json.dumps(asdict(measure_case(MemoryCase(spec, **request["case"])))), flush=True)


def measure_in_child(case: MemoryCase, timeout: float = 1800.0) -> StepMemory:
    """Measure one case in a process of its own, at most `timeout` seconds long."""
    path = [entry or os.getcwd() for entry in sys.path]
    request = json.dumps({"path": path, "case": asdict(case)})
    try:
        child = subprocess.run(
            [sys.executable, "-c", BOOTSTRAP, request],
            env={**os.environ, **CHILD_ENVIRONMENT, "OMP_NUM_THREADS": str(case.threads)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"no result within {timeout:.0f} s") from error
    if child.returncode == -9:
        raise OutOfMemoryError("does not fit: the process was killed, most likely for its memory")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        if any(text in child.stderr for text in OUT_OF_MEMORY):
            raise OutOfMemoryError(f"does not fit: {last}")
        raise MeasurementError(f"exit status {child.returncode}: {last}")
    return StepMemory(**json.loads(child.stdout.strip().splitlines()[-1]))


def figures_in_child(case: MemoryCase) -> dict[str, Any]:
    """The figures of `measure_in_child` as plain data, or as "error" why there are none."""
    release_cached(torch.device(case.device))
    try:
        return asdict(measure_in_child(case))
    except MeasurementError as error:
        return {"error": str(error)}
