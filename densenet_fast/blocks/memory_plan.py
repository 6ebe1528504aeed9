"""What a training step holds in memory, and which bottlenecks need not be made again.

A step is fullest in the backward of one block, nearly always the first, which has the largest
images; blocks behind it are done by then, and what they kept is free again. Up to that peak, or up
to a budget, bottlenecks are held instead of recomputed: the same peak in less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from densenet_fast.blocks.specs import Checkpoint


class Plan(NamedTuple):
    """How one block runs: its mode, and how many of its last layers' bottlenecks are held."""

    mode: Checkpoint
    hold: int


def statistics_bytes(channels: int, itemsize: int) -> int:
    """Bytes of mean and variance of features of `itemsize` bytes: they are float32 at least."""
    return 2 * channels * max(4, itemsize)


def gradient_in_place(channels: int, end: int) -> bool:
    """Whether a block's input gets its gradient in the gradient buffer, which then stays.

    A copy beside the buffer would be the larger part of it: most of its rows are the input's.
    """
    return 2 * channels > end


@dataclass(frozen=True)
class BlockSize:
    """A dense block in a chain of blocks."""

    pixels: int  # of all images together
    channels: int  # of the input
    end: int  # of all features
    widths: Sequence[int]  # bottleneck channels, layer by layer; 0: there is no bottleneck
    growth: int  # the widest layer's
    output: int  # elements of what follows the block
    itemsize: int  # bytes of an element
    weights: int  # bytes of the convolutions' gradients, which it hands over when it is done
    lasting: int  # bytes of those that stay, as parameters that had no gradient keep them
    pitch: int = 0  # elements between two pixels of the feature buffer, if not `end`
    workspace: int = 0  # bytes that the kernels of its backward need for partial results
    taps: int = 9  # of the second convolutions
    gradient: int = 0  # elements that the incoming gradient occupies, if more than `output`
    returned: bool = False  # whether the features are the output, which others read and keep
    beside: int = 0  # bytes that are kept besides: seeds, and what a transition behind it keeps
    transition: int = 0  # bytes that the backward of such a transition, by itself, needs
    waiting: int = 0  # bytes of gradients that wait, meanwhile, for blocks before this one

    @property
    def buffer(self) -> int:
        """Bytes of the feature buffer."""
        return ((self.pixels - 1) * (self.pitch or self.end) + self.end) * self.itemsize

    @property
    def input(self) -> int:
        """Bytes of the block's input."""
        return self.pixels * self.channels * self.itemsize

    @property
    def incoming(self) -> int:
        """Bytes of the gradient of what follows the block."""
        return max(self.output, self.gradient) * self.itemsize

    @property
    def input_gradient(self) -> int:
        """Elements that the gradient of the input occupies."""
        return self.pixels * (self.end if self.in_place else self.channels)

    @property
    def in_place(self) -> bool:
        """Whether that is a part of the gradient buffer."""
        return gradient_in_place(self.channels, self.end)

    @property
    def reads(self) -> list[tuple[int, int]]:
        """Channels that the first convolution of each layer reads, and its last one."""
        growth = (self.end - self.channels) // max(1, len(self.widths))
        starts = [self.channels + layer * growth for layer in range(len(self.widths))]
        return [(start, width or start) for start, width in zip(starts, self.widths, strict=True)]

    def bottlenecks(self, hold: int) -> int:
        """Bytes of the last layers' bottlenecks."""
        return self.pixels * sum(self.widths[len(self.widths) - hold :]) * self.itemsize

    def kept(self, plan: Plan) -> int:
        """Bytes kept between forward and backward."""
        statistics = statistics_bytes(self.end + sum(self.widths), self.itemsize) + self.itemsize
        kept = statistics + self.beside
        if plan.mode == "block":
            return kept + self.input + (self.buffer if self.returned else 0)
        return kept + self.buffer + self.bottlenecks(plan.hold)

    def forward(self, plan: Plan) -> int:
        """Bytes that the forward needs besides what is kept."""
        if self.returned:
            return self.input
        others = self.buffer if plan.mode == "block" else self.input
        scratch = self.widths if plan.mode == "block" else self._recomputed(plan)
        widest = self.pixels * max(scratch, default=0) * self.itemsize
        return others + max(widest, self.output * self.itemsize)

    def backward(self, plan: Plan) -> int:
        """Bytes that the backward needs besides what is kept: buffers, scratch and gradients.

        That of a transition by itself, which comes before the block's own, included.
        """
        again = 0
        if plan.mode == "block":  # what others read is free by now
            again = self.bottlenecks(plan.hold) + (0 if self.returned else self.buffer)
        widest = max(self.widths, default=0) + max(self._recomputed(plan), default=0)
        given = 0 if self.in_place else self.channels
        scratch = self.pixels * max(widest + self.growth, given) * self.itemsize
        own = again + self.buffer + scratch + self.workspace + self.incoming + self.weights
        return self.waiting + max(own, self.transition)

    def recomputed_products(self, plan: Plan) -> int:
        """Multiplications that the backward does a second time."""
        growth = (self.end - self.channels) // max(1, len(self.widths))
        first = [read * width for (read, _), width in zip(self.reads, self.widths, strict=True)]
        count = sum(first[: len(first) - plan.hold])
        if plan.mode == "block":  # all layers once more, then those that are not held
            count += sum(first) + self.taps * growth * sum(read for _, read in self.reads)
        return self.pixels * count

    def _recomputed(self, plan: Plan) -> Sequence[int]:
        return self.widths[: len(self.widths) - plan.hold]


@dataclass(frozen=True)
class StemSize:
    """What is before the first block; all in bytes. Without pooling there is only a convolution."""

    features: int = 0  # the convolution's output, where norm, ReLU and pooling follow
    pooled: int = 0
    positions: int = 0  # of the maxima
    statistics: int = 0
    copies: int = 0  # of images and weight in another type or layout, kept if nothing is remade
    wide: int = 0  # what the convolution needs besides: a wider type's tensors, or a matrix
    recomputable: bool = False
    in_place: bool = False  # whether the gradient of recomputed features takes their place
    weights: int = 0  # the convolution's gradient
    lasting: int = 0  # the same, if it stays

    def recomputed(self, plans: Sequence[Plan]) -> bool:
        """Whether the convolution is made again in the backward."""
        return self.recomputable and bool(plans) and plans[0].mode != "none"

    def kept(self, plans: Sequence[Plan]) -> int:
        """Bytes kept between forward and backward."""
        again = self.recomputed(plans)
        return self.positions + self.statistics + (0 if again else self.features + self.copies)

    def scratch(self, plans: Sequence[Plan]) -> int:
        """Bytes that the backward needs besides: gradients, and the output once more."""
        again = self.recomputed(plans)
        # The norm's gradient first; then, the features freed, the convolution's.
        both = 1 + (again and not self.in_place)
        most = max(self.features * both, self.features * again + self.wide)
        return most + self.pooled + self.weights


@dataclass(frozen=True)
class HeadSize:
    """What is behind the last block; all in bytes."""

    kept: int = 0  # with what cross entropy keeps
    scratch: int = 0  # that its backward needs besides: the classifier's gradient, and the scores'
    lasting: int = 0  # the classifier's gradient, if it stays


@dataclass(frozen=True)
class NetworkSize:
    """A whole network of fused blocks."""

    stem: StemSize
    blocks: Sequence[BlockSize]
    head: HeadSize

    def kept(self, plans: Sequence[Plan]) -> int:
        """Bytes kept between forward and backward."""
        blocks = sum(block.kept(plan) for block, plan in zip(self.blocks, plans, strict=True))
        return self.stem.kept(plans) + blocks + self.head.kept

    def backwards(self, plans: Sequence[Plan]) -> list[int]:
        """Bytes alive in the backward of each block, in forward order."""
        now = self.stem.kept(plans)
        lasting = self.head.lasting + sum(block.lasting for block in self.blocks)
        found = []
        for block, plan in zip(self.blocks, plans, strict=True):
            now += block.kept(plan)
            lasting -= block.lasting  # those of blocks behind it, whose backward is over
            found.append(now + lasting + block.backward(plan))
        return found

    def stem_backward(self, plans: Sequence[Plan]) -> int:
        """Bytes alive in the stem's backward, the last of all."""
        lasting = self.head.lasting + sum(block.lasting for block in self.blocks)
        scratch = self.stem.scratch(plans)
        if self.stem.pooled and self.blocks:
            first = self.blocks[0]
            scratch += first.input_gradient * first.itemsize - self.stem.pooled
        return self.stem.kept(plans) + lasting + scratch

    def peak(self, plans: Sequence[Plan]) -> int:
        """Bytes of the step's fullest moment."""
        return max(self._moments(plans))

    def _moments(self, plans: Sequence[Plan]) -> Iterator[int]:
        again = self.stem.recomputed(plans)
        now = self.stem.kept(plans)
        yield now + self.stem.pooled + self.stem.features * again + self.stem.wide
        for block, plan in zip(self.blocks, plans, strict=True):
            now += block.kept(plan)
            yield now + block.forward(plan)
        yield now + self.head.kept + self.head.scratch
        yield from self.backwards(plans)
        yield self.stem_backward(plans)


def uniform(blocks: Sequence[BlockSize], mode: Checkpoint) -> list[Plan]:
    """All blocks in this mode, nothing held that it does not keep."""
    return [Plan(mode, len(block.widths) if mode == "none" else 0) for block in blocks]


def held_below_peak(network: NetworkSize, modes: Sequence[Checkpoint]) -> list[Plan]:
    """Each block in its mode, with as many bottlenecks held as cost no peak memory."""
    plans = [uniform([block], mode)[0] for block, mode in zip(network.blocks, modes, strict=True)]
    return _held(network, plans, max(network.backwards(plans), default=0))


def _held(network: NetworkSize, plans: Sequence[Plan], limit: int) -> list[Plan]:
    """As many bottlenecks held as keep the backward of every block within `limit` bytes.

    In mode "bottleneck" they are kept from the forward on, so they must fit into the backwards of
    all later blocks too. In mode "block", whose point is to keep little in between, they are held
    from the recomputed forward to the end of the block's own backward. Later blocks come first:
    their bottlenecks are small and cost most to make again.
    """
    plans = list(plans)
    room = [limit - alive for alive in network.backwards(plans)]
    for index in reversed(range(len(plans))):
        block, (mode, hold) = network.blocks[index], plans[index]
        affected = range(index, index + 1 if mode == "block" else len(plans))
        for width in reversed(block.widths[: len(block.widths) - hold]):
            size = block.pixels * width * block.itemsize
            if any(room[at] < size for at in affected):
                break
            hold += 1
            for at in affected:
                room[at] -= size
        plans[index] = Plan(mode, hold)
    return plans


def _held_within(network: NetworkSize, plans: Sequence[Plan], budget: int) -> list[Plan]:
    """As many bottlenecks held as keep every moment of the step within `budget` bytes."""
    limit = budget
    while True:
        held = _held(network, plans, limit)
        excess = network.peak(held) - budget  # of a forward, which `_held` does not look at
        if excess <= 0 or held == plans:
            return held
        limit -= excess


class DoesNotFitError(RuntimeError):
    """No choice of modes keeps a step within the budget; `needed` bytes would."""

    def __init__(self, budget: int, needed: int) -> None:
        self.budget = budget
        self.needed = needed
        super().__init__(
            f"a training step needs {_mib(needed)} at least, {_mib(needed - budget)} more than the "
            f"memory budget of {_mib(budget)}: use smaller batches or images, or a larger budget"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB ({size:,} bytes)"


_MOST_COMBINED = 8  # blocks whose modes are all combined


def within_budget(network: NetworkSize, budget: int) -> list[Plan]:
    """The plan that recomputes least among those whose peak is at most `budget` bytes.

    Raises:
        DoesNotFitError: where there is none.
    """
    everything = uniform(network.blocks, "none")
    if network.peak(everything) <= budget:
        return everything
    fitting: list[tuple[int, list[Plan]]] = []
    least: int | None = None
    for modes in _choices(len(network.blocks)):
        plans = [Plan(mode, 0) for mode in modes]
        needed = network.peak(plans)
        least = needed if least is None else min(least, needed)
        if needed <= budget:
            plans = _held_within(network, plans, budget)
            blocks = zip(network.blocks, plans, strict=True)
            fitting.append((sum(block.recomputed_products(plan) for block, plan in blocks), plans))
    if not fitting:
        raise DoesNotFitError(budget, least or 0)
    return min(fitting, key=lambda found: found[0])[1]


def _choices(blocks: int) -> Iterator[tuple[Checkpoint, ...]]:
    """Modes of every block that are worth comparing. In long chains the first blocks lead."""
    both: tuple[Checkpoint, ...] = ("bottleneck", "block")
    if blocks <= _MOST_COMBINED:
        yield from product(both, repeat=blocks)
        return
    for count in range(blocks + 1):
        yield (both[1],) * count + (both[0],) * (blocks - count)
