"""What a training step needs in memory, worked out before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from densenet_fast import arguments
from densenet_fast.blocks.autocast import computed_type
from densenet_fast.blocks.memory_plan import (
    DoesNotFitError,
    NetworkSize,
    Plan,
    held_below_peak,
    within_budget,
)
from densenet_fast.blocks.specs import NETWORK_MODES, SHAPES, Checkpoint
from densenet_fast.fusion import fusion_report
from densenet_fast.modules import input_checks
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.eligibility import Expected
from densenet_fast.modules.fc_densenet import FCDenseNet
from densenet_fast.modules.layers import DenseBlock
from densenet_fast.reports import table

__all__ = ["DoesNotFitError", "MemoryEstimate", "PartMemory", "estimate"]


@dataclass(frozen=True)
class PartMemory:
    """The stem, a block with what is fused behind it, or the classifier; bytes."""

    name: str
    mode: Checkpoint | None  # of a block
    held: int | None  # layers of a block whose bottlenecks are not made again
    kept: int  # between forward and backward
    scratch: int  # that its backward needs besides
    peak: int  # all that is alive at its fullest moment of the backward


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one training step beyond the parameters and the images; bytes.

    `str()` gives a table.
    """

    parts: tuple[PartMemory, ...]
    kept: int  # between forward and backward
    peak: int  # of the fullest moment

    def __str__(self) -> str:
        rows = [("part", "mode", "held", "kept, MiB", "scratch, MiB", "peak, MiB")]
        for part in self.parts:
            mode = part.mode or ""
            held = "" if part.held is None else str(part.held)
            sizes = _mib(part.kept), _mib(part.scratch), _mib(part.peak)
            rows.append((part.name, mode, held, *sizes))
        rows.append(("step", "", "", _mib(self.kept), "", _mib(self.peak)))
        return "\n".join(table(rows, left=2))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def estimate(
    model: EfficientDenseNet | FCDenseNet,
    input_size: Sequence[int],
    dtype: torch.dtype | None = None,
    checkpoint: str | None = None,
    *,
    memory_budget: int | None = None,
) -> MemoryEstimate:
    """Memory of a training step: forward, cross entropy (of pixels in an FCDenseNet) and backward.

    Nothing runs, so the model may be on the meta device. Gradients count as the model is now: those
    of parameters without a gradient are new and stay, others are added to what is there. On CUDA
    devices the kernels' workspace of a few MiB does not count, nor, of volumes, the pooled input of
    a transition, an eighth of it.

    Args:
        model: a network all of whose parts run fused (see `fusion_report`).
        input_size: images' shape, (N, C, H, W) in two dimensions.
        dtype: what features are stored in: the parameters' type, or autocast's; None for that of
            the parameters under the autocast that is on now.
        checkpoint: "none", "bottleneck", "block" or "auto"; None for the model's own setting. In an
            `FCDenseNet` that is one of its blocks, and "auto" finds nothing to choose between: it
            tells whether a step keeps to the budget.
        memory_budget: bytes for "auto"; None for the model's own.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        DoesNotFitError: "auto" with a budget that no choice of modes keeps to.
        RuntimeError: some part of the model does not run fused.
    """
    if not isinstance(model, (EfficientDenseNet, FCDenseNet)):
        kind = type(model).__name__
        raise TypeError(f"estimate expects an EfficientDenseNet or FCDenseNet, got {kind}")
    shape = _shape(model, input_size)
    parameter = model.classifier.weight
    if dtype is None:
        dtype = computed_type(parameter.dtype, parameter.device.type)
    elif not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type of torch, got {dtype!r}")
    mode = None if checkpoint is None else arguments.one_of("checkpoint", checkpoint, NETWORK_MODES)
    budget = memory_budget
    if isinstance(model, EfficientDenseNet):
        mode = mode or model.checkpoint
        budget = model.memory_budget if budget is None else budget
    arguments.memory_budget(mode, budget)

    blocks = {
        name.removeprefix("features."): part
        for name, part in model.named_modules()
        if isinstance(part, DenseBlock)
    }
    network = _network(model, shape, dtype, recompute=mode != "none")
    if mode == "auto":
        assert budget is not None
        plans = within_budget(network, budget)
    elif mode is None or checkpoint is None:  # blocks may have modes of their own
        plans = held_below_peak(network, [block.checkpoint for block in blocks.values()])
    else:
        plans = held_below_peak(network, [mode] * len(blocks))
    return MemoryEstimate(
        tuple(_parts(network, plans, list(blocks))), network.kept(plans), network.peak(plans)
    )


def _shape(model: EfficientDenseNet | FCDenseNet, input_size: Sequence[int]) -> tuple[int, ...]:
    expected = f"({SHAPES[model.spatial_dims][1:-1]})"
    if isinstance(input_size, (str, bytes)) or not isinstance(input_size, Sequence):
        raise TypeError(f"input_size must be {expected}, got {input_size!r}")
    sizes = tuple(arguments.integer(f"input_size[{i}]", size) for i, size in enumerate(input_size))
    if len(sizes) != 2 + model.spatial_dims:
        raise ValueError(f"input_size must be {expected}, got {sizes}")
    images = torch.empty(sizes, device="meta")
    input_checks.chain("estimate", model.to_smallest(), images)
    return sizes


def _network(
    model: EfficientDenseNet | FCDenseNet,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    recompute: bool,
) -> NetworkSize:
    parameter = model.classifier.weight
    expected = Expected(parameter.dtype, parameter.device, len(shape) - 2)
    network = model.step_size(shape, dtype, expected, recompute=recompute)
    if not network:
        plain = [row for row in fusion_report(model) if not row.fused]
        why = f": {plain[0].name} {plain[0].reason}" if plain else ""
        raise RuntimeError(f"the estimate knows networks that run fused throughout alone{why}")
    return network


def _parts(
    network: NetworkSize, plans: Sequence[Plan], names: Sequence[str]
) -> Iterator[PartMemory]:
    stem, head = network.stem, network.head
    first = stem.kept(plans), stem.scratch(plans), network.stem_backward(plans)
    yield PartMemory("stem", None, None, *first)
    peaks = network.backwards(plans)
    for name, block, plan, peak in zip(names, network.blocks, plans, peaks, strict=True):
        sizes = block.kept(plan), block.backward(plan), peak
        yield PartMemory(name, plan.mode, plan.hold, *sizes)
    peak = network.kept(plans) + head.scratch
    yield PartMemory("classifier", None, None, head.kept, head.scratch, peak)
