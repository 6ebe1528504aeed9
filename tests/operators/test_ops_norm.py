"""Statistics, norm vectors, the deferred correction and dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import BACKENDS, HALF, device, on
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_TYPES, PIXELS, WIDE, Case, assert_close, nchw, pixel_sum
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators.philox import philox
from densenet_fast.operators.reference_block import Coefficients, _affine_gradient

Pixels = tuple[int, ...]


def statistics(rows: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    mean, var = case.vector(rows.shape[-1]), case.vector(rows.shape[-1])
    operators.channel_statistics(rows, mean, var)
    return mean, var


def check_statistics(pixels: Pixels, channels: int, offset: float, dtype: torch.dtype) -> None:
    case = Case(dtype)
    rows = case.rows(pixels, channels, case.randn(*pixels, channels) + offset)
    mean, var = statistics(rows, case)
    values = rows.double().flatten(0, -2)
    exact_mean, exact_var = values.mean(0), values.var(0, correction=0)
    # Far from zero each value is only known to eps * offset; no more than that may be lost.
    eps = torch.finfo(case.statistics).eps
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=8 * eps * (abs(offset) + 4))
    torch.testing.assert_close(var.double(), exact_var, rtol=64 * eps, atol=64 * eps)
    case.assert_guards()


@pytest.mark.parametrize("dtype", [*WIDE, *HALF], ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize("channels", [1, 17, 100])
def test_channel_statistics(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int
) -> None:
    if dtype == torch.float16 and backend == "cpu":
        pytest.skip("the CPU kernels do not compute in float16")
    check_statistics(pixels, channels, 0.0, dtype)


@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_variance_survives_a_mean_far_larger_than_the_deviation(
    backend: str, offset: float
) -> None:
    case = Case(torch.float32)
    rows = case.rows((4, 30, 31), 5, case.randn(4, 30, 31, 5) + offset)
    _, var = statistics(rows, case)
    exact = rows.double().flatten(0, -2).var(0, correction=0)
    torch.testing.assert_close(var.double(), exact, rtol=1e-4, atol=0)


def test_constant_channels_have_no_variance(backend: str) -> None:
    case = Case(torch.float32)
    rows = case.rows((3, 9, 11), 20, torch.tensor(0.1, dtype=torch.float64))
    _, var = statistics(rows, case)
    assert var.max() <= 1e-15


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_channel(backend: str, value: float) -> None:
    case = Case(torch.float32)
    rows = case.rows((2, 5, 5), 20)
    rows[1, 2, 3, 7] = value
    mean, var = statistics(rows, case)
    for vector in (mean, var):
        assert not vector[7].isfinite()
        assert vector[:7].isfinite().all()
        assert vector[8:].isfinite().all()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("channels", [1, 17, 64])
@pytest.mark.parametrize("affine", [True, False])
def test_coefficients_and_running_statistics_are_those_of_batch_norm(
    backend: str, dtype: torch.dtype, channels: int, affine: bool
) -> None:
    case = Case(dtype)
    pixels, eps, momentum = (3, 5, 4), 1e-3, 0.3
    rows = case.rows(pixels, channels)
    mean, var = statistics(rows, case)
    weight, bias = (case.vector(channels), case.vector(channels)) if affine else (None, None)
    scale, shift, rstd = (case.vector(channels) for _ in range(3))
    operators.norm_coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
    running_mean, running_var = case.vector(channels), case.vector(channels).abs()
    exact_running = running_mean.double(), running_var.double()
    exact_running = tuple(tensor.clone() for tensor in exact_running)
    operators.update_running_statistics_(
        torch.cat((mean, var)),
        [running_mean, running_var],
        [],
        [0, channels, -1, channels],
        [momentum],
        60,
    )

    exact_affine = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
    exact = F.batch_norm(
        nchw(rows.double()), *exact_running, *exact_affine, True, momentum, eps
    ).movedim(1, -1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    values = rows.double() * scale.double() + shift.double()
    torch.testing.assert_close(values, exact, **tolerance)
    torch.testing.assert_close(rstd.double(), (var.double() + eps).rsqrt(), **tolerance)
    torch.testing.assert_close(running_mean.double(), exact_running[0], **tolerance)
    torch.testing.assert_close(running_var.double(), exact_running[1], **tolerance)


def test_running_statistics_of_any_type_and_layout() -> None:
    statistics = torch.tensor([1.0, 2.0, 3.0, 4.0])  # means, variances
    buffers = torch.zeros(2, 2, dtype=torch.bfloat16).t()  # not contiguous, not the kernels' type
    running_mean, running_var = buffers[:, 0], buffers[:, 1]
    operators.update_running_statistics_(
        statistics, [running_mean, running_var], [], [0, 2, -1, 2], [0.5], 2
    )
    assert running_mean.tolist() == [0.5, 1.0]
    assert running_var.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_the_affine_map_is_the_backward_of_batch_norm(
    backend: str, dtype: torch.dtype, channels: int
) -> None:
    case = Case(dtype)
    pixels, eps = (3, 5, 4), 1e-3
    rows, grad_norm = case.rows(pixels, channels), case.rows(pixels, channels)
    mean, var = statistics(rows, case)
    weight, bias = case.vector(channels), case.vector(channels)
    scale, shift, rstd = (case.vector(channels) for _ in range(3))
    operators.norm_coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
    grad_beta = pixel_sum(grad_norm)
    grad_gamma = pixel_sum(grad_norm * (rows - mean) * rstd)
    norm = Coefficients(scale, shift, mean, rstd)
    p, q, s = _affine_gradient(norm, grad_gamma, grad_beta, 60, frozen=False).double()

    value = rows.double().clone().requires_grad_()
    output = F.batch_norm(nchw(value), None, None, weight.double(), bias.double(), True, 0.0, eps)
    (exact,) = torch.autograd.grad(output, value, nchw(grad_norm.double()))
    actual = p * grad_norm.double() + q * rows.double() + s
    assert_close("gradient", actual, exact, dtype, 60)

    # The same gradient in two halves: what a layer accumulates, and the deferred correction.
    accumulated = case.rows(pixels, channels, scale.double() * grad_norm.double())
    out = case.rows(pixels, channels)
    sum_grad, sum_grad_x = scale * grad_beta, scale * rstd * grad_gamma
    operators.finish_gradient(rows, accumulated, mean, sum_grad, sum_grad_x, out)
    assert_close("gradient", out, exact, dtype, 60)
    case.assert_guards()


# Dropout


def test_philox_gives_the_published_words() -> None:
    words = philox(6, 0, torch.device("cpu"))
    assert [f"{word:08x}" for word in words[:4].tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]
    # All 64 bits of the seed are the key, and the words of a stream are not repeated.
    assert not torch.equal(words, philox(6, 1 << 32, torch.device("cpu")))
    assert philox(4096, 7, torch.device("cpu")).unique().numel() > 4090


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 12, 32])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(backend: str, dtype: torch.dtype, pixels: Pixels, channels: int, p: float) -> None:
    case, seed = Case(dtype), 0x9E3779B97F4A7C15 - 2**64
    growth = case.rows(pixels, channels)
    before = growth.double().clone()
    operators.dropout_(growth, seed, p)
    keep = philox(growth.numel(), seed, growth.device) >= int(p * 2**32)
    exact = torch.where(keep.view(before.shape), before / (1 - p), 0.0)
    torch.testing.assert_close(growth.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    case.assert_guards()


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("pixels", [(3, 5, 7), (4, 9), (2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("channels", [1, 13, 16])
def test_dropout_of_whole_channels(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int
) -> None:
    case, seed, p = Case(dtype), 7, 0.5
    growth = case.rows(pixels, channels)
    before = growth.double().clone()
    operators.dropout_(growth, seed, p, True)
    keep = philox(pixels[0] * channels, seed, growth.device) >= int(p * 2**32)
    images = keep.view(pixels[0], *(1,) * (len(pixels) - 1), channels)
    exact = torch.where(images, before / (1 - p), 0.0)
    torch.testing.assert_close(growth.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)
    case.assert_guards()


def test_dropout_keeps_the_expected_share(backend: str) -> None:
    ones = torch.ones(4, 30, 30, 10, device=device())
    operators.dropout_(ones, 5, 0.3)
    assert abs(float((ones > 0).float().mean()) - 0.7) < 5 * (0.21 / 36000) ** 0.5


@pytest.mark.parametrize(("p", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_everything(backend: str, p: float, share: float) -> None:
    ones = torch.ones(1, 3, 3, 5, device=device())
    operators.dropout_(ones, 5, p)
    assert (ones == share).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pixels=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    channels=st.integers(1, 70),
    offset=st.sampled_from([0.0, 1.0, -50.0]),
    dtype=st.sampled_from(CPU_TYPES),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_statistics_of_any_shape(
    name: str, pixels: Pixels, channels: int, offset: float, dtype: torch.dtype
) -> None:
    with on(name):
        check_statistics(pixels, channels, offset, dtype)
