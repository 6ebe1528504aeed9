"""float32 weights with features of half the width: rounded in passing, float32 gradients."""

from __future__ import annotations

import pytest
import torch
from devices import CPU, CUDA, HALF_TYPES
from ops_arguments import ARGUMENTS, BLOCKS, arguments, tensors, wide

from densenet_fast import operators

WEIGHTED = [op for op in ARGUMENTS if "conv" in op or op.startswith("transition")]


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES, indirect=["backend"], ids=str)
@pytest.mark.parametrize("op", [*WEIGHTED, *BLOCKS])
def test_float32_weights(backend: str, op: str, dtype: torch.dtype) -> None:
    rounded, mixed = arguments(op, dtype), wide(arguments(op, dtype))
    getattr(operators, op)(*rounded.values())
    getattr(operators, op)(*mixed.values())
    results = dict(tensors(mixed))
    for name, expected in tensors(rounded):
        assert torch.equal(results[name].to(expected.dtype), expected), name


@pytest.mark.parametrize("backend", [CPU, CUDA], indirect=True)
@pytest.mark.parametrize("op", WEIGHTED)
def test_other_mixtures_are_errors(backend: str, op: str) -> None:
    for features, weight in ((torch.float32, torch.float16), (torch.float64, torch.float32)):
        given = arguments(op, features)
        given["weight"] = given["weight"].to(weight)
        with pytest.raises(RuntimeError, match="should have type"):
            getattr(operators, op)(*given.values())
