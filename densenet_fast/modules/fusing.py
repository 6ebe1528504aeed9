"""A network's feature modules as steps: what may be fused across the border of two modules is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast.blocks import synchronized
from densenet_fast.modules import eligibility, step_sizes
from densenet_fast.modules.dimensions import MODULES, Conv
from densenet_fast.modules.eligibility import Expected, named
from densenet_fast.modules.kept_plans import kept
from densenet_fast.modules.layer_parts import TailParts
from densenet_fast.modules.layers import DenseBlock, FusedBlock, FusedChain, Transition
from densenet_fast.modules.steps import (
    ConvStep,
    DenseStep,
    MaxTransitionStep,
    ModuleStep,
    StemStep,
    Step,
)

# What a network does behind its last norm: ReLU and the average over all pixels, that average alone
# (the norm has the ReLU inside), or something unknown.
Head = Literal["relu and average", "average"] | None


def _pooled_obstacle(
    modules: Sequence[nn.Module],
    length: int,
    expected: Expected,
    pooling: Callable[[nn.Module, int], str | None],
) -> str | None:
    """Why the first `length` modules are no norm, ReLU and such pooling to fuse, or None."""
    if len(modules) < length:
        return "is not followed by a ReLU and a max-pooling"
    norm, *relu, pool = modules[:length]
    if not eligibility.is_norm(norm):
        return eligibility.other_type(norm, MODULES[expected.dims].norm)
    found = named("the norm", eligibility.norm(norm, None, expected))
    for module in relu:
        found = found or named("the ReLU", eligibility.exactly(module, nn.ReLU))
    return found or named("the pooling", pooling(pool, expected.dims))


def _block_obstacle(block: nn.Module) -> str | None:
    """Why `block` must be called as a module (which may still fuse its layers), or None."""
    return eligibility.of_kind(block, "block", DenseBlock)


def _tail(module: nn.Module, head: Head, expected: Expected) -> DenseStep | MaxTransitionStep | str:
    """A transition, or a last norm and the head, as a step behind a block; or why it is none."""
    if isinstance(module, Transition):
        obstacle = eligibility.of_kind(module, "transition", Transition)
        return module.step(obstacle, None, expected)
    if head is None:
        return "what follows it is not known to be ReLU and the average over all pixels"
    if head == "average" and not eligibility.norm_with_relu(module):
        return f"is a {type(module).__name__} without a ReLU of its own"
    found = eligibility.norm(module, None, expected)
    return found or DenseStep([], "bottleneck", TailParts(module))  # type: ignore[arg-type]


def _fuse_behind(planned: list[Step], tail: DenseStep | MaxTransitionStep | str) -> str | None:
    """Give the last step, if it is a block's, this tail; or why not. One may go by itself."""
    if isinstance(tail, MaxTransitionStep):
        planned.append(tail)
        return None
    block = planned[-1] if planned else None
    obstacle = None
    if isinstance(block, ModuleStep) and isinstance(block.module, FusedBlock):
        obstacle = f"the block before it {_block_obstacle(block.module)}"
    elif not isinstance(block, DenseStep) or block.tail is not None:
        obstacle = "is not behind a DenseBlock"
    elif not block.ends_fused:
        obstacle = "the layer before it runs plain"
    if isinstance(tail, str) or tail.tail is None:
        return obstacle or str(tail)
    norm, conv, *_ = tail.tail
    if isinstance(block, DenseStep) and obstacle is None:
        layers, order = block.segments[-1], block.order
        assert isinstance(layers, list)
        group = synchronized.OneGroup(*(layer.of_features for layer in layers))
        if order is not None and (conv is None or len(order) <= len(layers)):
            obstacle = "the block before it returns its features in an order of its own"
        elif group.admits(norm):
            block.tail, block.order = tail.tail._replace(order=order), None
            return None
        else:
            obstacle = "takes statistics over other ranks than the block before"
    if type(norm) is nn.SyncBatchNorm and conv is None:
        # PyTorch's own does not synchronise on CPUs: fused by itself beats calling it.
        planned.append(tail)
        return None
    return obstacle


def _continue(planned: Sequence[Step], step: DenseStep) -> str | None:
    """Let the last step, if it is a block's, go on with the layers of this one; or why not."""
    block = planned[-1] if planned else None
    if not isinstance(block, DenseStep) or block.tail is not None or not block.ends_fused:
        return "is not behind a DenseBlock"
    before, layers = block.segments[-1], step.segments[-1]
    assert isinstance(before, list)
    assert isinstance(layers, list)
    known = len(before) + 1
    given = range(known) if block.order is None else block.order
    if len(given) < known or block.checkpoint != step.checkpoint:
        return "does not go on with all features of the block before"
    group = synchronized.OneGroup(*(layer.of_features for layer in before))
    if not all(group.admits(layer.of_features) for layer in layers):
        return "takes statistics over other ranks than the block before"

    def pieces(order: Sequence[int] | None, count: int) -> Sequence[int] | None:
        """An order of the step's first `count` pieces as one of the block's with the step's."""
        order = range(count) if order is None else order
        found = [p for piece in order for p in (given if piece == 0 else (known - 1 + piece,))]
        return None if found == list(range(known - 1 + count)) else found

    joined = [
        *before,
        *(parts._replace(order=pieces(parts.order, at + 1)) for at, parts in enumerate(layers)),
    ]
    block.segments = [*block.segments[:-1], joined]
    if step.tail is not None:
        block.tail = step.tail._replace(order=pieces(step.tail.order, len(layers) + 1))
        block.order = None
    else:
        block.order = pieces(step.order, len(layers) + 1)
    return None


class Chain(NamedTuple):
    """The steps of a chain of modules, and whether ReLU and pooling are in the last one.

    `accepted` are shapes of images that have been found to fit.
    """

    steps: Sequence[Step]
    pooled: bool
    accepted: set[torch.Size]


def planned(owner: nn.Module, modules: Sequence[nn.Module], input: Tensor, **options: Any) -> Chain:
    """What `steps` gives for `modules`, which are below `owner`; kept while nothing changes."""
    expected = eligibility.expected(input)

    def make() -> Chain:
        return Chain(*steps(modules, expected, **options), set())

    return kept(owner, (expected, *options.items()), make)


def steps(
    modules: Sequence[nn.Module],
    expected: Expected,
    *,
    recompute: bool | None = None,
    head: Head = "relu and average",
    memory_format: torch.memory_format = torch.preserve_format,
    obstacles: dict[int, str] | None = None,
) -> tuple[list[Step], bool]:
    """The steps of a chain of modules, and whether the last one includes the head behind them.

    `recompute` says whether the stem's convolution is made again in the backward; None: as the
    first block does. Others' code between the steps gets features in `memory_format`. `obstacles`
    is told why modules are called as such, by their places.
    """
    planned: list[Step] = []
    pooled = False
    at = 0
    while at < len(modules):
        module = modules[at]
        taken = 1
        if isinstance(module, FusedBlock):
            obstacle = _block_obstacle(module)
            if obstacle is None:
                step = module.step(None, None, expected)
                step.memory_format = memory_format
                if step.segments and isinstance(step.segments[0], list):
                    _channels_innermost(planned)
                planned.append(step)
        elif isinstance(module, FusedChain):
            found = eligibility.of_kind(module, "chain", FusedChain) or module.chain(expected)
            obstacle = found if isinstance(found, str) else None
            for part in found if isinstance(found, list) else ():
                if isinstance(part, DenseStep) and part.segments:
                    added = _continue(planned, part)
                else:
                    added = _fuse_behind(planned, part)
                if added is not None:
                    _channels_innermost(planned)
                    planned.append(part)
            if module.averages():
                memory_format = averaged_format(memory_format, expected.dims)
        elif isinstance(module, Transition) or at + 1 == len(modules):
            obstacle = _fuse_behind(planned, _tail(module, head, expected))
            pooled = obstacle is None and not isinstance(module, Transition)
            memory_format = averaged_format(memory_format, expected.dims)
        else:
            length = 2 if eligibility.norm_with_relu(module) else 3
            obstacle = _pooled_obstacle(modules[at:], length, expected, eligibility.stem_pool)
            if obstacle is None:
                _channels_innermost(planned)
                taken = length
                block = modules[at + length : at + length + 1]
                again = _recomputes(block) if recompute is None else recompute
                conv = _recomputable_conv(planned) if again else None
                planned.append(StemStep(module, conv))  # type: ignore[arg-type]
            elif not _pooled_obstacle(modules[at:], length, expected, eligibility.whole_average):
                tail = TailParts(module, kept=True)  # type: ignore[arg-type]
                obstacle = _fuse_behind(planned, DenseStep([], "bottleneck", tail))
                taken = length if obstacle is None else 1
        if obstacle is not None:
            planned.append(ModuleStep(module, memory_format))
            if obstacles is not None:
                obstacles[at] = obstacle
        at += taken
    return planned, pooled


def averaged_format(memory_format: torch.memory_format, dims: int) -> torch.memory_format:
    """The layout behind a transition's average: PyTorch averages volumes into contiguous ones."""
    given = memory_format is not torch.preserve_format
    return torch.contiguous_format if given and dims == 3 else memory_format


def _channels_innermost(planned: list[Step]) -> None:
    """Make the last step, if it is a convolution, write its output as fused steps want it."""
    last = planned[-1] if planned else None
    if isinstance(last, ModuleStep) and eligibility.any_conv(last.module) is None:
        planned[-1] = ConvStep(last.module)  # type: ignore[arg-type]


def _recomputes(behind: Sequence[nn.Module]) -> bool:
    """Whether the block behind the stem recomputes."""
    blocks = [block for block in behind if isinstance(block, (FusedBlock, FusedChain))]
    return any(block.checkpoint != "none" for block in blocks)


def _recomputable_conv(planned: list[Step]) -> Conv | None:
    """The stem's convolution, taken off the plan, if the stem can make it itself."""
    last = planned[-1] if planned else None
    if isinstance(last, ConvStep) and eligibility.zero_padded(last.module):
        planned.pop()
        return last.module
    return None


def run(planned: Sequence[Step], input: Tensor, *, hold: bool = True) -> Tensor:
    """The steps one after another; `hold` fills the memory below the peak with bottlenecks."""
    first = next((at for at, step in enumerate(planned) if isinstance(step, DenseStep)), None)
    ours = False  # whether nobody else has the features
    holds: Iterator[int] = repeat(0)
    for at, step in enumerate(planned):
        if hold and at == first and torch.is_grad_enabled():
            holds = step_sizes.held_bottlenecks(planned[at:], input)
        if isinstance(step, DenseStep):
            input = step.run(input, ours=ours, hold=next(holds))
            ours = step.tail is not None or step.ends_fused
        else:
            input = step.run(input)
            ours = not isinstance(step, ModuleStep) or eligibility.leaves_input(step.module)
    return input


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
