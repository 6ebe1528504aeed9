"""Image sizes through a network, worked out before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from densenet_fast.blocks.stem_convolution import Size, windows
from densenet_fast.modules import input_checks
from densenet_fast.modules.eligibility import kind_of, norm_with_relu, setting, touched

# A search for the smallest image gives up here: some module takes no image that is reasonable.
_LARGEST_SEARCHED = 4096

_KEEP_SIZE = (
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.SiLU,
    nn.GELU,
    nn.ELU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
)


def output_size(module: nn.Module, size: Size) -> Size | None:
    """Height and width behind `module`, or None where that cannot be known."""
    if touched(module):
        return None
    own = kind_of(module)
    if own in ("block", "layer") or type(module) in _KEEP_SIZE or norm_with_relu(module):
        return size
    if own == "transition":
        through: Size | None = size
        for child in module._modules.values():
            if through is None or child is None:
                return None
            through = output_size(child, through)
        return through
    if isinstance(module, nn.Conv2d):
        readable = type(module) is nn.Conv2d and not isinstance(module.padding, str)
    elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        readable = type(module) in (nn.MaxPool2d, nn.AvgPool2d)
        readable = readable and not setting(module.__dict__, "ceil_mode")
    else:
        return None
    if not readable:
        return None
    stride = _pair(module.stride)
    if min(stride) < 1:
        return None  # PyTorch's error is to come
    return windows(
        size,
        _pair(module.kernel_size),
        stride,
        _pair(module.padding),
        _pair(setting(module.__dict__, "dilation")),
    )


def _pair(value: Any) -> Size:
    return (value, value) if isinstance(value, int) else value


def known_sizes(modules: Iterable[nn.Module], size: Size) -> list[tuple[nn.Module, Size]]:
    """The modules, each with the size of its input, as far as that is known.

    Ends behind the first module that leaves no pixel.
    """
    known: list[tuple[nn.Module, Size]] = []
    through: Size | None = size
    for module in modules:
        if through is None or min(through) < 1:
            break
        known.append((module, through))
        through = output_size(module, through)
    return known


def _fits(modules: list[nn.Module], size: Size) -> bool:
    known = known_sizes(modules, size)
    last = output_size(*known[-1]) if known else None
    return last is None or min(last) >= 1


def check(owner: str, modules: Iterable[nn.Module], input: Tensor) -> list[nn.Module]:
    """Refuse images too small for pooling, and norms that would see one value per channel.

    Returns the modules whose input size is known.
    """
    chain = list(modules)
    n, size = input.shape[0], (input.shape[2], input.shape[3])
    if not _fits(chain, size):
        minimum = next(
            (edge for edge in range(1, _LARGEST_SEARCHED) if _fits(chain, (edge, edge))), None
        )
        raise ValueError(
            f"{owner} got images too small for its pooling: {size[0]}×{size[1]}, "
            f"expected at least {minimum}×{minimum}"
        )
    known = known_sizes(chain, size)
    for module, (height, width) in known:
        input_checks.values_per_channel(module, n, height, width)
    return [module for module, _ in known]
