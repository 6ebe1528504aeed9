"""What PyTorch knows of the compiled operators, and that they agree with their twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import CPU, CUDA
from op_cases import CPU_TYPES, WIDE
from ops_arguments import ARGUMENTS, arguments, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from densenet_fast import operators
from densenet_fast.operators import extension
from densenet_fast.operators.backends import Setting, use_backend

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")


compiled = pytest.mark.parametrize("backend", [CPU, CUDA], indirect=True)


def operator(op: str) -> Any:
    return getattr(torch.ops.densenet_fast, op).default


def test_every_operator_is_covered() -> None:
    schemas = {
        schema.name.removeprefix("densenet_fast::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("densenet_fast::")
    }
    # Those of `optimize_for_inference` have tests of their own (test_inference.py).
    stem = {"stem_convolution_forward", "stem_convolution_backward"}  # test_ops_stem.py
    assert schemas == {*ARGUMENTS, *stem, "packed_weights", "dense_block_inference_"}


# Graphs take nearly all of the time, and are the same for every type.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
CHECKS_OF_GRAPHS = (*CHECKS, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "sliced"])
@compiled
def test_opcheck(backend: str, op: str, dtype: torch.dtype, dense: bool) -> None:
    given = tuple(arguments(op, dtype, dense=dense).values())
    checks = CHECKS_OF_GRAPHS if dtype == torch.float32 else CHECKS
    torch.library.opcheck(operator(op), given, test_utils=checks)


@pytest.mark.parametrize("op", ARGUMENTS)
@compiled
def test_fake_tensors_pass_through(backend: str, op: str) -> None:
    with FakeTensorMode() as mode:
        fakes = [tree_map_only(Tensor, mode.from_tensor, value) for value in arguments(op).values()]
        assert operator(op)(*fakes) is None


VECTORS = {"norm_coefficients", "update_running_statistics_"}


@pytest.mark.parametrize("op", sorted(set(ARGUMENTS) - VECTORS))
@compiled
def test_empty_images_are_refused(backend: str, op: str) -> None:
    empty = [
        value[:0] if isinstance(value, Tensor) and value.dim() == 4 else value
        for value in arguments(op).values()
    ]
    with pytest.raises(RuntimeError, match="should have at least one element"):
        operator(op)(*empty)


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@compiled
def test_kernels_and_twins_agree(backend: Setting, op: str, dtype: torch.dtype) -> None:
    results = []
    for name in ("reference", backend):
        given = arguments(op, dtype)
        with use_backend(name):
            getattr(operators, op)(*given.values())
        results.append(dict(tensors(given)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=10 * tolerance, atol=10 * tolerance, msg=name
        )
