"""The switch for Winograd convolutions on the CPU.

F(2x2, 3x3), Lavin and Gray 2015 (arXiv:1509.09308), makes four outputs of a 3x3 convolution with 16
multiplications for 36. The CPU kernels use it where it is faster: where

    16 * ceil(H / 2) * ceil(W / 2) * (k + 6)  <  9 * H * W * k,

for images of H x W, at least 3 x 3, and k output channels, at most 128. Of volumes it is
F(4x4, 3x3) in each slice, and slices are summed directly: sixteen outputs with 108 multiplications
for 432, where

    36 * ceil(H / 4) * ceil(W / 4) * (k + 6)  <  9 * H * W * k.

Rounding errors are those of plain float32 convolutions; of volumes about twice those, and up to
five times where sums are short, in small volumes and with few channels. A NaN or infinity reaches
all outputs of the tiles that touch it.
"""

from __future__ import annotations

from densenet_fast.operators import extension

__all__ = ["enable_winograd", "winograd_enabled"]


def enable_winograd(enabled: bool) -> None:
    """Let the CPU kernels use Winograd convolutions (the default), or not, in the whole process.

    Not to be called while a step runs. Raises `TypeError` for anything but a bool and
    `RuntimeError` where there are no compiled kernels.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled should be True or False, got {enabled!r}")
    if extension.C is None:
        raise RuntimeError(f"there are no compiled CPU kernels: {extension.LOAD_ERROR}")
    extension.C.allow_winograd(enabled)


def winograd_enabled() -> bool:
    """Whether the CPU kernels may use Winograd convolutions."""
    return extension.C is not None and bool(extension.C.winograd_allowed())
