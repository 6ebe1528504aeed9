"""The modules that networks in one, two and three dimensions are made of, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from densenet_fast import arguments
from densenet_fast.blocks.stem_convolution import Conv as Conv  # for all modules

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class Modules(NamedTuple):
    """The types for one number of dimensions."""

    conv: type[Conv]
    transposed: type[Transposed]
    norm: type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]
    average: type[nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d]
    maximum: type[nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d]
    whole: type[nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d]
    instance: type[nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d]
    dropout: type[nn.Dropout1d | nn.Dropout2d | nn.Dropout3d]


_NAMES: tuple[str, ...] = ("Conv", "ConvTranspose", "BatchNorm", "AvgPool", "MaxPool")
_NAMES += ("AdaptiveAvgPool", "InstanceNorm", "Dropout")
MODULES = {dims: Modules(*(getattr(nn, f"{name}{dims}d") for name in _NAMES)) for dims in (1, 2, 3)}
CONVS, TRANSPOSED, BATCH_NORMS, AVERAGES, MAXIMA, _, INSTANCE_NORMS, DROPOUTS = zip(
    *MODULES.values(), strict=True
)
NORMS: tuple[type[nn.Module], ...] = (*BATCH_NORMS, nn.SyncBatchNorm)
# By a module's exact type.
OF_TYPE: dict[Any, int] = {kind: dims for dims, kinds in MODULES.items() for kind in kinds}


def modules(spatial_dims: int) -> Modules:
    """Those of a constructor's `spatial_dims`."""
    return MODULES[arguments.one_number_of("spatial_dims", spatial_dims, MODULES)]
