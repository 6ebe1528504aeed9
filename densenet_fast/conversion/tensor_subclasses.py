"""Inputs of other types than Tensor: MONAI's MetaTensor is computed with as the tensor it is."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from densenet_fast.modules.eligibility import PLAIN_TENSORS

_warned: set[type] = set()


def plain(input: Any) -> Any:
    """What a converted module computes with. Warns once of each type that keeps it from fusing."""
    if _has_metadata(input):
        return input.as_subclass(Tensor)
    kind = type(input)
    if isinstance(input, Tensor) and kind not in PLAIN_TENSORS and kind not in _warned:
        if not torch.compiler.is_compiling():
            _warned.add(kind)
            warnings.warn(
                "densenet_fast runs converted modules plain, as they were before, where their "
                f"input is a {kind.__name__}: pass a plain tensor, for example "
                "input.as_subclass(torch.Tensor)",
                RuntimeWarning,
                stacklevel=2,
            )
    return input


def restored(output: Tensor, input: Any) -> Tensor:
    """`output`, computed with `plain(input)`, as it comes where the modules get `input` itself."""
    if not _has_metadata(input):
        return output
    kind = type(input)
    # What MetaTensor does behind every function: the metadata follow from the arguments' alone.
    [result] = kind.update_meta([output.as_subclass(kind)], torch.relu, (input,), {})
    return result


def _has_metadata(input: Any) -> bool:
    # Dynamo has no way into a subclass's own functions: there the modules get what came.
    if type(input) in PLAIN_TENSORS or torch.compiler.is_compiling():
        return False
    # Whoever has made one has imported MONAI.
    module: Any = sys.modules.get("monai.data.meta_tensor")
    return module is not None and type(input) is module.MetaTensor
