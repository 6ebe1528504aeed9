"""The processes that train together, as torchrun starts them; a single one without it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from densenet_fast.train.errors import TrainingError, UsageError

Result = TypeVar("Result")
_POLL = 0.05  # seconds between two looks at who has joined
_LOST = ("gloo", "Gloo", "NCCL", "nccl", "Connection closed")  # in errors of lost connections


@dataclass(frozen=True)
class Processes:
    """One process among those that train together: this one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    local_count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest value of all processes; on the CPU, so no GPU waits for it."""
        if self.count == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Result) -> list[Result]:
        """Every process' value, in order, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def on_main(self, act: Callable[[], Result]) -> Result:
        """What `act` returns on the main process alone; its usage errors end all processes."""
        if self.count == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = act()
            except UsageError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def same_buffers(self, model: torch.nn.Module) -> None:
        """The main process' buffers on all: batch norms' statistics differ between them."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(
            f"expected a whole number in the environment's {name}, as torchrun sets it, "
            f"got {text!r}"
        ) from None


def from_environment(environment: Mapping[str, str] | None = None) -> Processes:
    """What torchrun says of this process.

    Raises:
        UsageError: the environment has some of torchrun's variables, but not all.
    """
    environment = os.environ if environment is None else environment
    if "WORLD_SIZE" not in environment:
        return Processes()
    count, rank = _number(environment, "WORLD_SIZE"), _number(environment, "RANK")
    if not 0 <= rank < count:
        raise UsageError(f"expected a RANK below WORLD_SIZE {count}, got {rank}")
    local_rank = _number(environment, "LOCAL_RANK", rank)
    local_count = _number(environment, "LOCAL_WORLD_SIZE", count)
    if not 0 <= local_rank < local_count:
        raise UsageError(
            f"expected a LOCAL_RANK below LOCAL_WORLD_SIZE {local_count}, got {local_rank}"
        )
    if count > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise UsageError(f"{count} processes need {name} in the environment: use torchrun")
    return Processes(rank, count, local_rank, local_count)


def _agree(store: Store, processes: Processes, timeout: float) -> str:
    """A name for this attempt to train together, known to all that take part in it.

    torchrun's store outlives workers that it starts again, and has the addresses of those that are
    gone: without a new name, a process may wait for one of them.
    """
    own = uuid.uuid4().hex
    if not processes.main:
        store.set(f"hello/{processes.rank}", own)
        store.wait([f"welcome/{own}"], timedelta(seconds=timeout))
        name = store.get(f"welcome/{own}").decode()
        store.set(f"joined/{name}/{processes.rank}", "")
        return name
    end = time.monotonic() + timeout
    missing = set(range(1, processes.count))
    while missing:
        for rank in sorted(missing):
            if store.check([f"joined/{own}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):  # perhaps an earlier one's: looked at again
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", own)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"missing: rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL if missing else 0)
    return own


@contextmanager
def together(processes: Processes, device: torch.device, timeout: float) -> Iterator[None]:
    """While it lasts, the processes are one group: gloo on the CPU, nccl between GPUs.

    Args:
        processes: this process among the others.
        device: where it computes.
        timeout: seconds that processes wait for each other, to join and later.

    Raises:
        UsageError: some process has not joined in time.
        TrainingError: some process was lost later.
    """
    if processes.count == 1:
        yield
        return
    limit = timedelta(seconds=timeout)
    try:
        store, rank, count = next(
            rendezvous("env://", processes.rank, processes.count, timeout=limit)
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(_agree(store, processes, timeout), store),
            rank=rank,
            world_size=count,
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"not all of {processes.count} processes joined at {address} within {timeout:g} s: "
            f"start the others, or raise --rendezvous-timeout ({_first_line(error)})"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _LOST):
            raise
        raise TrainingError(
            f"another process is lost ({_first_line(error)}); torchrun --max-restarts starts all "
            "again, and --resume auto goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
