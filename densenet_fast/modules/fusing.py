"""A network's feature modules as steps: what may be fused across the border of two modules is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast.blocks import synchronized
from densenet_fast.blocks.autocast import computed_type
from densenet_fast.blocks.memory_plan import (
    BlockSize,
    HeadSize,
    NetworkSize,
    Plan,
    StemSize,
    held_below_peak,
)
from densenet_fast.blocks.nodes import planned_shape
from densenet_fast.modules import eligibility
from densenet_fast.modules.kept_plans import kept
from densenet_fast.modules.layer_parts import TailParts
from densenet_fast.modules.layers import DenseBlock, FusedBlock, Transition
from densenet_fast.modules.steps import ConvStep, DenseStep, ModuleStep, Segment, StemStep, Step


def stem_obstacle(
    modules: Sequence[nn.Module], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why these do not start with a stem's norm, ReLU and max-pooling to run as one node, or None.

    Only the first `stem_length` of them are looked at.
    """
    length = stem_length(modules)
    if len(modules) < length:
        return "is not followed by a ReLU and a max-pooling"
    norm, pool = modules[0], modules[length - 1]
    if not eligibility.is_norm(norm):
        return eligibility.other_type(norm, nn.BatchNorm2d)
    if (found := eligibility.norm(norm, norm.num_features, dtype, device)) is not None:
        return f"the norm {found}"
    if length == 3 and (found := eligibility.exactly(modules[1], nn.ReLU)) is not None:
        return f"the ReLU {found}"
    if (found := eligibility.max_pool(pool)) is not None:
        return f"the pooling {found}"
    return None


def stem_length(modules: Sequence[nn.Module]) -> int:
    """Modules of the stem's norm, ReLU and max-pooling: a norm may have the ReLU inside."""
    return 2 if modules and eligibility.norm_with_relu(modules[0]) else 3


def block_obstacle(block: nn.Module) -> str | None:
    """Why `block` must be called as a module (which may still fuse its layers), or None."""
    return eligibility.of_kind(block, "block", DenseBlock)


def transition_obstacle(
    transition: nn.Module, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why `transition` cannot be fused behind a block, or None."""
    found = eligibility.of_kind(transition, "transition", Transition)
    if found is None:
        assert isinstance(transition, Transition)
        found = transition.obstacle(None, dtype, device)
    return found


def final_norm_obstacle(norm: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `norm` cannot be fused with the ReLU and the pooling behind it, or None."""
    if not eligibility.is_norm(norm):
        return eligibility.other_type(norm, nn.BatchNorm2d)
    return eligibility.norm(norm, norm.num_features, dtype, device)


def final_norm_with_relu_obstacle(
    norm: nn.Module, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The same for a norm with a ReLU of its own, behind which only the pooling follows."""
    if not eligibility.norm_with_relu(norm):
        return f"is a {type(norm).__name__} without a ReLU of its own"
    return final_norm_obstacle(norm, dtype, device)


# Why a final norm cannot be fused with what is behind it.
FinalObstacle = Callable[[nn.Module, torch.dtype, torch.device], "str | None"]


def group_obstacle(segments: Sequence[Segment], norm: nn.Module) -> str | None:
    """Why `norm` cannot share the statistics of the block with these segments, or None."""
    if not synchronized.active() or not segments or not isinstance(segments[-1], list):
        return None
    group = synchronized.OneGroup(*(layer.norm1 for layer in segments[-1]))
    return None if group.admits(norm) else "takes statistics over other ranks than the block before"


def stands_alone(
    modules: Sequence[nn.Module],
    at: int,
    dtype: torch.dtype,
    device: torch.device,
    final: FinalObstacle | None,
) -> bool:
    """Whether the final norm is one to fuse with ReLU and pooling where no block precedes it.

    PyTorch's own SyncBatchNorm does not synchronise on CPUs: that beats calling it.
    """
    norm = modules[at]
    return (
        type(norm) is nn.SyncBatchNorm
        and at + 1 == len(modules)
        and final is not None
        and final(norm, dtype, device) is None
    )


class Chain(NamedTuple):
    """The steps of a chain of modules, and whether ReLU and pooling are in the last one.

    `accepted` are shapes of images that have been found to fit.
    """

    steps: Sequence[Step]
    pooled: bool
    accepted: set[torch.Size]


def planned(owner: nn.Module, modules: Sequence[nn.Module], input: Tensor, **options: Any) -> Chain:
    """What `steps` gives for `modules`, which are below `owner`; kept while nothing changes."""
    dtype, device = eligibility.parameter_type(input), input.device

    def make() -> Chain:
        return Chain(*steps(modules, dtype, device, **options), set())

    return kept(owner, (dtype, device, *options.items()), make)


def steps(
    modules: Sequence[nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    *,
    recompute: bool | None = None,
    final: FinalObstacle | None = final_norm_obstacle,
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[list[Step], bool]:
    """The steps of a chain of modules that ReLU and the average over all pixels follow.

    The second value says whether the last step includes these two already. `recompute` says
    whether the stem's convolution is made again in the backward; None: as the first block does.
    `final` finds obstacles to that inclusion; None: something else may follow. Others' code between
    the steps gets features in `memory_format`.
    """
    planned: list[Step] = []
    at = 0
    while at < len(modules):
        module = modules[at]
        if eligibility.is_norm(module):
            if stem_obstacle(modules[at:], dtype, device) is None:
                _channels_innermost(planned)
                conv, behind_stem = None, at + stem_length(modules[at:])
                first = modules[behind_stem : behind_stem + 1]
                if _recomputes(first) if recompute is None else recompute:
                    conv = _recomputable_conv(planned)
                planned.append(StemStep(module, conv))
                at = behind_stem
                continue
            if stands_alone(modules, at, dtype, device, final):
                planned.append(DenseStep([], "bottleneck", TailParts(module)))
                return planned, True
        elif isinstance(module, FusedBlock) and block_obstacle(module) is None:
            segments = module.segments(None, dtype, device)
            step = DenseStep(
                segments, module.checkpoint, lists=module.lists, memory_format=memory_format
            )
            if step.segments and isinstance(step.segments[0], list):
                _channels_innermost(planned)
            planned.append(step)
            at += 1
            if at == len(modules) or not _ends_fused(step):
                continue
            behind = modules[at]
            if isinstance(behind, Transition):
                if (
                    transition_obstacle(behind, dtype, device) is None
                    and group_obstacle(step.segments, behind.norm) is None
                ):
                    step.tail = behind.parts()
                    at += 1
            elif eligibility.is_norm(behind) and at + 1 == len(modules):
                if (
                    final is not None
                    and final(behind, dtype, device) is None
                    and group_obstacle(step.segments, behind) is None
                ):
                    step.tail = TailParts(behind)
                    return planned, True
            continue
        planned.append(ModuleStep(module, memory_format))
        at += 1
    return planned, False


def _channels_innermost(planned: list[Step]) -> None:
    """Make the last step, if it is a convolution, write its output as fused steps want it."""
    last = planned[-1] if planned else None
    if isinstance(last, ModuleStep) and eligibility.any_conv(last.module) is None:
        assert isinstance(last.module, nn.Conv2d)
        planned[-1] = ConvStep(last.module)


def _recomputes(behind: Sequence[nn.Module]) -> bool:
    """Whether the block behind the stem recomputes."""
    return any(isinstance(block, FusedBlock) and block.checkpoint != "none" for block in behind)


def _recomputable_conv(planned: list[Step]) -> nn.Conv2d | None:
    """The stem's convolution, taken off the plan, if the stem can make it itself."""
    last = planned[-1] if planned else None
    if isinstance(last, ConvStep) and eligibility.zero_padded(last.module):
        planned.pop()
        return last.module
    return None


def _ends_fused(step: DenseStep) -> bool:
    return bool(step.segments) and isinstance(step.segments[-1], list)


def run(planned: Sequence[Step], input: Tensor, *, hold: bool = True) -> Tensor:
    """The steps one after another; `hold` fills the memory below the peak with bottlenecks."""
    first = next((at for at, step in enumerate(planned) if isinstance(step, DenseStep)), None)
    ours = False  # whether nobody else has the features
    holds: Iterator[int] = repeat(0)
    for at, step in enumerate(planned):
        if hold and at == first and torch.is_grad_enabled():
            holds = _held_bottlenecks(planned[at:], input)
        if isinstance(step, DenseStep):
            input = step.run(input, ours=ours, hold=next(holds))
            ours = step.tail is not None or _ends_fused(step)
        else:
            input = step.run(input)
            ours = not isinstance(step, ModuleStep) or eligibility.leaves_input(step.module)
    return input


_plans = lru_cache(64)(held_below_peak)  # of sizes alone: most steps are as the one before


def _held_bottlenecks(planned: Sequence[Step], input: Tensor) -> Iterator[int]:
    """How many bottlenecks each block holds: some if there is nothing here but fused blocks."""
    steps = [step for step in planned if isinstance(step, DenseStep)]
    if len(steps) < len(planned) or all(step.checkpoint == "none" for step in steps):
        return repeat(0)
    stored = computed_type(input.dtype, input.device.type)
    sizes = block_sizes(steps, planned_shape(input.shape), stored.itemsize)
    if sizes is None or not (input.requires_grad or _trainable(steps[0])):
        return repeat(0)  # in a frozen block the fullest backward may not happen
    network = NetworkSize(StemSize(), tuple(sizes), HeadSize())
    modes = tuple(step.checkpoint for step in steps)
    # Dynamo traces through caches, and says so.
    plan = held_below_peak if torch.compiler.is_compiling() else _plans
    plans = plan(network, modes)
    return iter([plan.hold for plan in plans])


def block_sizes(
    steps: Sequence[DenseStep], shape: Sequence[int], itemsize: int
) -> list[BlockSize] | None:
    """Sizes of blocks behind one another, the first one's input [N, C, H, W] being `shape`.

    None where some layer is not fused. `itemsize` is that of a feature, in bytes.
    """
    images, channels, height, width = shape
    sizes: list[BlockSize] = []
    for step in steps:
        layers = step.segments[0] if len(step.segments) == 1 else None
        if not isinstance(layers, list):
            return None
        widths = [eligibility.weight_shape(layer.conv1)[0] for layer in layers]
        growths = [eligibility.weight_shape(layer.conv2)[0] for layer in layers]
        convolutions = [conv for layer in layers for conv in (layer.conv1, layer.conv2)]
        end, pixels = channels + sum(growths), images * height * width
        if step.tail is not None and step.tail.conv is not None:
            behind = eligibility.weight_shape(step.tail.conv)[0]
            convolutions.append(step.tail.conv)
            height, width = height // 2, width // 2
            output = images * height * width * behind
        else:
            behind, output = end, images * end if step.tail is not None else pixels * end
        gradients = gradient_bytes([conv.weight for conv in convolutions])
        sizes.append(
            BlockSize(
                pixels, channels, end, tuple(widths), max(growths), output, itemsize, *gradients
            )
        )
        channels = behind
    return sizes


def gradient_bytes(weights: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes of the weights' gradients, and of those that are new and stay."""
    wanted = [weight for weight in weights if weight.requires_grad]
    if torch.compiler.is_compiling():  # a graph hands over all its gradients when it is done
        return (sum(weight.nbytes for weight in wanted),) * 2
    lasting = [
        weight
        for weight in wanted
        if weight.is_leaf
        and weight.grad is None
        and not getattr(weight, "_post_accumulate_grad_hooks", None)
    ]
    return sum(weight.nbytes for weight in wanted), sum(weight.nbytes for weight in lasting)


def _trainable(step: DenseStep) -> bool:
    layers = step.segments[0]
    assert isinstance(layers, list)
    return any(
        parameter.requires_grad
        for layer in layers
        for part in (layer.norm1, layer.conv1, layer.norm2, layer.conv2)
        for parameter in part.parameters()
    )


def apply_plans(planned: Sequence[Step], plans: Sequence[Plan]) -> list[Step]:
    """The steps with each block's mode and held bottlenecks as planned."""
    applied: list[Step] = []
    blocks = iter(plans)
    keep_stem = bool(plans) and plans[0].mode == "none"
    for step in planned:
        if isinstance(step, DenseStep):
            mode, hold = next(blocks)
            step = replace(step, checkpoint=mode, hold=hold)
        elif isinstance(step, StemStep) and step.conv is not None and keep_stem:
            applied.append(ConvStep(step.conv))
            step = StemStep(step.norm)
        applied.append(step)
    return applied


def called_modules(planned: Sequence[Step]) -> list[nn.Module]:
    """The modules that the steps call as modules, or at which nobody has looked closely."""
    called: list[nn.Module] = []
    for step in planned:
        if isinstance(step, (ConvStep, ModuleStep)):
            called.append(step.module)
        elif isinstance(step, StemStep) and step.conv is not None:
            called.append(step.conv)
        elif isinstance(step, DenseStep):
            called.extend(part for part in step.segments if isinstance(part, nn.Module))
    return called
