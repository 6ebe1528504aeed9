"""Measurement inside one process: peak and kept memory of a step, bytes saved for the backward
pass, and times of several implementations in turn.

Memory is in bytes and time in seconds everywhere.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")


class MeasurementError(RuntimeError):
    """A figure could not be measured; the message says why."""


class OutOfMemoryError(MeasurementError):
    """There was not the memory that the case needs."""


@dataclass(frozen=True)
class MemorySample:
    """Memory of this process, or of the device, around one call; bytes."""

    before: int
    peak: int
    after: int

    @property
    def peak_above_rest(self) -> int:
        """What the call needed at its worst moment beyond what was there before it."""
        return self.peak - self.before


def _kibibytes(file: Path, field: str) -> int:
    """A field of one of Linux's tables of memory, in bytes."""
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise MeasurementError(f"{file} has no field {field}")


def resident_bytes(field: str = "VmRSS") -> int:
    """`VmRSS` (resident now) or `VmHWM` (most resident since the last reset) of this process."""
    return _kibibytes(STATUS, field)


def available_bytes(device: torch.device) -> int:
    """What the device, or the machine, can still give to a process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _kibibytes(MEMINFO, "MemAvailable")
    except OSError as error:
        raise MeasurementError(f"cannot read what memory is available: {error}") from error


def reset_peak() -> None:
    """Lower `VmHWM` to what is resident now."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise MeasurementError(
            f"peak memory on the CPU is read from Linux's /proc, and {CLEAR_REFS} "
            f"cannot be written here: {error}"
        ) from error


def release_free_memory() -> None:
    """Collect garbage and give free heap pages back, so that reuse of them counts."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on an accelerator; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_cached(device: torch.device) -> None:
    """Give the caching allocator's free memory back, for other processes on the same device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def tuned_libraries(device: torch.device) -> Iterator[None]:
    """While it lasts, cuDNN chooses each convolution's algorithm by trying them, once a shape.

    The peers' convolutions then run as fast as cuDNN can; the untimed round does the trying.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def sample_memory(call: Callable[[], object], device: torch.device) -> MemorySample:
    """Run `call` and sample memory around it: resident pages on the CPU, the caching
    allocator's bytes on a CUDA device. What `call` returns lives until `after` is read."""
    release_free_memory()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        after = torch.cuda.memory_allocated(device)
    else:
        reset_peak()
        before = resident_bytes()
        result = call()
        peak, after = resident_bytes("VmHWM"), resident_bytes()
    del result
    return MemorySample(before, max(peak, after), after)


class _Saved:
    """A tensor in the hands of autograd: it dies with the node of the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that is saved would hold its own node


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor], inputs: Tensor) -> int:
    """Bytes that autograd keeps between `forward` and its backward pass.

    Every storage counts once and whole, however many views of it are saved; parameters,
    buffers and `inputs` exist anyway and do not count.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = forward()
    free_of_charge = _storages([*model.parameters(), *model.buffers(), inputs])
    storages = _storages(saved.tensor for saved in alive)
    kept = sum(size for key, size in storages.items() if key not in free_of_charge)
    del output
    return kept


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with the device idle before and after.

    On a CUDA device between two events of its own clock, around the call on the current stream:
    waiting for the device does not count, the device's waiting for the host does.
    """
    synchronize(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleave(
    calls: MutableMapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    times: dict[str, list[float]],
    advance: Callable[[], None] = lambda: None,
    failed: Callable[[str, Exception], None] | None = None,
) -> None:
    """Time several calls in turn, A B C A B C ...; each has run before, untimed.

    What disturbs the machine then disturbs all of them. Times are appended to `times` as they
    arrive, so an interrupt keeps the rounds that were finished. A call that raises is taken out
    of `calls`, and the error goes to `failed`, if there is one.
    """
    names = list(calls)
    for _ in range(rounds):
        for name in names:
            try:
                if name in calls:
                    times.setdefault(name, []).append(timed(calls[name], device))
            except Exception as error:
                if failed is None:
                    raise
                del calls[name]  # and with it the network's memory
                failed(name, error)
            advance()
