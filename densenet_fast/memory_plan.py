"""How many bottlenecks of each block need not be made again: those that cost no peak memory.

A training step is fullest in the backward of one block, nearly always the first, which has the
largest images; blocks behind it are done by then, and what they kept is free again. Up to that
peak, bottlenecks are held instead of recomputed: the same peak in less time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from densenet_fast.specs import Checkpoint


@dataclass(frozen=True)
class BlockSize:
    """A dense block in a chain of blocks. An element is what a feature is stored in."""

    pixels: int  # of all images together
    channels: int  # of the input
    end: int  # of all features
    widths: Sequence[int]  # bottleneck channels, layer by layer
    growth: int  # the widest layer's
    output: int  # elements of what follows the block: the incoming gradient
    weights: int  # elements of the convolutions' gradients, which it hands over when it is done
    lasting: int  # elements of those that stay, as parameters that had no gradient keep them

    def kept(self, mode: Checkpoint) -> int:
        """Elements kept between forward and backward, without bottlenecks."""
        return self.pixels * (self.channels if mode == "block" else self.end)

    def backward(self, mode: Checkpoint) -> int:
        """Elements that the block's backward needs besides: buffers and scratch."""
        widest = max(self.widths, default=0)
        buffers = self.end * (2 if mode == "block" else 1)
        scratch = max(2 * widest + self.growth, self.channels)
        return self.pixels * (buffers + scratch) + self.output + self.weights


def held_bottlenecks(blocks: Sequence[BlockSize], mode: Checkpoint) -> list[int]:
    """For each block, in forward order, how many of its last layers' bottlenecks to hold.

    In mode "bottleneck" they are kept from the forward on, so they must fit into the backwards of
    all later blocks too. In mode "block", whose point is to keep little in between, they are held
    from the recomputed forward to the end of the block's own backward.
    """
    if mode == "none":
        return [len(block.widths) for block in blocks]
    room = _room(blocks, mode)
    held = [0] * len(blocks)
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        affected = range(index, index + 1 if mode == "block" else len(blocks))
        for width in reversed(block.widths):
            size = block.pixels * width
            if any(room[at] < size for at in affected):
                break
            held[index] += 1
            for at in affected:
                room[at] -= size
    return held


def _room(blocks: Sequence[BlockSize], mode: Checkpoint) -> list[int]:
    """Elements by which each block's backward stays below the fullest one."""
    kept, lasting = 0, sum(block.lasting for block in blocks)
    fill = []
    for block in blocks:
        kept += block.kept(mode)
        lasting -= block.lasting  # those of blocks behind it, whose backward is over
        fill.append(kept + lasting + block.backward(mode))
    return [max(fill) - elements for elements in fill]
