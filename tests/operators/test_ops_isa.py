"""Every instruction set the module was compiled for, and every number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import ops_arguments
import pytest
import torch
from op_cases import CPU_TYPES
from ops_arguments import ARGUMENTS, arguments, tensors
from test_ops_conv import check_conv1x1_backward, check_conv3x3_backward, check_forward
from test_ops_pool import check_average, check_maxpool, check_transition
from torch import Tensor

from densenet_fast import operators
from densenet_fast.build_info import build_info
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")

ISAS = build_info()["cpu_isa_usable"] if extension.LOADED else []
# Full and partial vectors, tiles and panels of every instruction set.
PIXELS = ((1, 1, 1), (1, 3, 70), (2, 9, 17), (2, 70), (1, 3, 5, 9))
POINTWISE = (
    "channel_statistics",
    "norm_coefficients",
    "update_running_statistics_",
    "dropout_",
    "finish_gradient",
)
CHANNELS = ((1, 1), (17, 3), (48, 12), (100, 32), (65, 48))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one instruction set, if this processor has it."""
    from densenet_fast import _C

    before = _C.isa_in_use()
    try:
        _C.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        with use_backend("cpu"):
            yield request.param
    finally:
        _C.set_isa(before)


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
def test_convolutions(
    isa: str, dtype: torch.dtype, pixels: tuple[int, ...], channels: int, outputs: int
) -> None:
    check_forward(1, pixels, channels, outputs, dtype)
    check_conv1x1_backward(pixels, channels, outputs, dtype)
    check_forward(3, pixels, channels, outputs, dtype)
    check_conv3x3_backward(pixels, channels, outputs, dtype)


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("pixels", [(1, 2, 2), *PIXELS[1:]], ids=str)
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
def test_pooling(
    isa: str, dtype: torch.dtype, pixels: tuple[int, ...], channels: int, outputs: int
) -> None:
    check_transition(pixels, channels, outputs, dtype, False)
    check_transition(pixels, channels, outputs, dtype, True)
    check_average(pixels, channels, dtype)
    check_maxpool(pixels, channels, True, dtype)
    check_maxpool(pixels, channels, False, dtype)


def run(op: str, dtype: torch.dtype) -> list[Tensor]:
    """The operator's arguments after its run: its results among them."""
    given = arguments(op, dtype)
    getattr(operators, op)(*given.values())
    return [value for _, value in tensors(given)]


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments of sizes that are worth several threads, and that divide into none evenly."""
    for name, value in {
        "PIXELS": (3, 17, 39),
        "SMALL": (3, 8, 19),
        "STEM": (3, 9, 20),
        "C": 70,
        "B": 48,
        "K": 12,
    }.items():
        monkeypatch.setattr(ops_arguments, name, value)


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads_and_from_run_to_run(
    isa: str, op: str, dtype: torch.dtype
) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(op, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize("op", POINTWISE)
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
def test_pointwise_operators_agree_with_the_reference(
    isa: str, op: str, dtype: torch.dtype
) -> None:
    actual = run(op, dtype)
    with use_backend("reference"):
        expected = run(op, dtype)
    eps = torch.finfo(dtype).eps
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * eps * float(other.abs().max()))


@pytest.mark.parametrize("channels", range(1, 18))
def test_bfloat16_is_rounded_as_pytorch_rounds(isa: str, channels: int) -> None:
    """Ties to even, overflow to infinity, subnormal numbers; NaN of any payload stays NaN."""
    generator = torch.Generator().manual_seed(channels)
    bits = torch.randint(-(2**31), 2**31, (64, channels), generator=generator)
    bits[:32] = bits[:32] & ~0xFFFF | 0x8000  # ties
    special = [0, 1, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1]
    bits[0, : len(special)] = torch.tensor(special)[:channels]
    bits[1] = torch.tensor(special)[channels % len(special)]
    features = torch.zeros(1, 1, 1, channels, dtype=torch.bfloat16)
    ones, out = torch.ones(channels), torch.empty(1, 1, 1, channels, dtype=torch.bfloat16)
    for row in bits.to(torch.int32):
        values = row.view(torch.float32)
        # 1 * values, by a shift that lets the gradient pass.
        grad_out = torch.ones(1, channels, dtype=torch.bfloat16)
        sums = torch.empty(channels), torch.empty(channels)
        operators.norm_relu_avgpool_backward(
            grad_out, features, values.contiguous(), ones, ones, ones, out, *sums
        )
        expected = values.bfloat16()
        assert torch.equal(out.flatten().isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(out.flatten()[number], expected[number])
