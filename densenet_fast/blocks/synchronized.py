"""Statistics over all ranks of a process group: `nn.SyncBatchNorm` in fused blocks and stems.

The forward gathers (mean, variance, count) of every rank, and every rank merges them by Chan's
formula in the same order: all get the same bits. The backward adds up the sums that correct a
gradient for the batch's statistics; gradients of parameters stay each rank's own, as
`DistributedDataParallel` averages those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densenet_fast.operators.torch_internals import process_group


def active() -> bool:
    """Whether there are process groups in this process."""
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[str, int] | None:
    """The group of all ranks, by name, and their number; None without process groups."""
    group: Any = dist.group.WORLD if active() else None
    return None if group is None else (group.group_name, dist.get_world_size(group))


def group_of(norm: nn.Module) -> str:
    """The group whose values the statistics of a step made now are taken from, by name.

    "": this process's alone. Names fit into a graph, and are the same on all ranks.
    """
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not active():
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


class OneGroup:
    """Whether norms that read the same features may share their statistics."""

    def __init__(self, *norms: nn.Module) -> None:
        """Admit `norms`, which are of one group."""
        self._active = active()
        self._decided = False
        self._group = ""
        for norm in norms:
            self.admits(norm)

    def admits(self, norm: nn.Module) -> bool:
        """Whether `norm` takes statistics over the ranks of those admitted before, or none."""
        if not self._active or not (norm.training or norm.running_mean is None):
            return True
        group = group_of(norm)
        if not self._decided:
            self._decided, self._group = True, group
        return group == self._group


def check(group: str, device: torch.device, name: str) -> None:
    """Refuse a group (its name) that cannot reduce the statistics of the norm `name` on `device`.

    Raises:
        RuntimeError: the group has been destroyed.
        ValueError: its backend has nothing for that type of device.
    """
    try:
        ranks = process_group(group)
        dist.get_process_group_ranks(ranks)
    except (KeyError, LookupError, RuntimeError, ValueError):
        raise RuntimeError(
            f"{name} should synchronise its statistics over a process group that exists, but its "
            "process group has been destroyed"
        ) from None
    backends = dict(pair.split(":", 1) for pair in dist.get_backend_config(ranks).split(","))
    if device.type not in backends:
        able = ", ".join(f"{kind} (by {backend})" for kind, backend in backends.items())
        raise ValueError(
            f"{name} should synchronise its statistics on {device}, but its process group "
            f"communicates tensors on {able} alone"
        )


def check_modules(owner: nn.Module, device: torch.device) -> None:
    """`check` of every norm below `owner` that would synchronise now; a graph's nodes do it."""
    if not active() or torch.compiler.is_compiling():
        return
    checked = {""}
    for module in owner.modules():
        group = group_of(module)
        if group not in checked:
            name = next(name for name, part in owner.named_modules() if part is module)
            check(group, device, f"{type(owner).__name__}: {name}")
            checked.add(group)


def combine(name: str, rows: int, mean: Tensor, var: Tensor, total: Tensor) -> None:
    """Turn mean and biased variance of this rank's `rows` values into those of all ranks' values.

    `total` [1] becomes their number. It stays on the device: nobody waits for it.
    """
    group, channels = process_group(name), len(mean)
    mine = torch.cat((mean, var, total.fill_(rows)))
    all_ranks = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather(list(all_ranks.unbind()), mine, group=group)
    means, variances, counts = all_ranks.split((channels, channels, 1), dim=1)
    total.copy_(counts.sum(0))
    shares = counts / total
    # From one rank's mean on: what is added is as small as the means' differences.
    mean.copy_(means[0] + (shares * (means - means[0])).sum(0))
    var.copy_((shares * (variances + (means - mean).square_())).sum(0))


def mean_over_ranks(name: str, sums: Tensor, total: Tensor) -> Tensor:
    """`sums` over this rank's values, added up over the ranks, divided by all `total` values.

    Overwrites `sums`.
    """
    dist.all_reduce(sums, group=process_group(name))
    return sums.div_(total)
