"""Offsets beyond 32 bits: rows so far apart that the last ones lie past 2**31 elements.

The buffers are tens of gigabytes of addresses, of which the operators touch a page for each row.
"""

from __future__ import annotations

import pytest
import torch
from ops_arguments import ARGUMENTS, arguments
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators import extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels"),
]


CUDA_HALF = pytest.param("cuda", torch.float16, marks=pytest.mark.cuda)  # half the memory


def far_apart(rows: Tensor) -> Tensor:
    """The same values, the last row more than 2**31 elements behind the first."""
    count = rows[..., 0].numel()
    pitch = 2**31 // (count - 1) + rows.shape[3]
    wide = rows.new_empty(*rows.shape[:3], pitch)[..., : rows.shape[3]]
    assert wide[-1, -1, -1, 0].storage_offset() > 2**31
    return wide.copy_(rows)


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), CUDA_HALF], indirect=["backend"]
)
def test_rows_beyond_32_bit_offsets(backend: str, op: str, dtype: torch.dtype) -> None:
    near, far = arguments(op, dtype), arguments(op, dtype)
    images = [
        name
        for name, value in far.items()
        if isinstance(value, Tensor) and value.dim() == 4 and name not in ("weight", "grad_weight")
    ]
    images = [name for name in images if name != "argmax"]
    if not images:
        pytest.skip("no images among the arguments")
    if backend == "cuda":
        needed = len(images) * 2**31 * dtype.itemsize + 2**30
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed >> 30} GiB of free memory on the GPU")
    for name in images:
        far[name] = far_apart(far[name])
    getattr(operators, op)(*near.values())
    getattr(operators, op)(*far.values())
    for name, expected in near.items():
        if isinstance(expected, Tensor):
            torch.testing.assert_close(far[name], expected, rtol=1e-5, atol=1e-5, msg=name)
