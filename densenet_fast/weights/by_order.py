"""Tensors of a file and of a model in pairs by the order in which they come, whatever their names.

Modules register their tensors in the order in which they are written, which for DenseNets is the
order in which they run: norm, convolution, norm, convolution, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from densenet_fast.weights.comparison import COUNTER, Misfit, shape
from densenet_fast.weights.key_layouts import OTHER, Names


def names(
    values: Mapping[str, Any], own: Mapping[str, Any], ignored: Callable[[str], bool]
) -> tuple[Names, Names, Misfit | None]:
    """The keys of a file and of a model, by the model's, up to the first pair that is none.

    A pair has one shape, and names that end alike (`weight`, `running_mean`). What is `ignored` of
    either side is in no pair.
    """
    theirs = [name for name in values if not ignored(name)]
    ours = [name for name in own if not ignored(name)]
    if COUNTER not in {_kind(name) for name in theirs}:  # files of before 2018
        ours = [name for name in ours if _kind(name) != COUNTER]
    mine = Names(OTHER, "", {name: name for name in own})
    paired: dict[str, str] = {}
    for file, model in zip_longest(theirs, ours, fillvalue=""):
        found, expected = file and shape(values[file]), model and shape(own[model])
        if _kind(file) != _kind(model) or found != expected:
            return Names(OTHER, "", paired), mine, Misfit(file, model, found, expected)
        paired[model] = file
    used = set(paired.values())
    rest = {name: name for name in values if name not in used}
    return Names(OTHER, "", rest | paired), mine, None


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
