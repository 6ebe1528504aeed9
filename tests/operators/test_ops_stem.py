"""The stem's convolution of volumes on the CPU: every shape, type, layout and number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_TYPES, Case, assert_close, nchw, nhwc
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from densenet_fast import operators
from densenet_fast.build_info import build_info
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")

Pixels = tuple[int, ...]
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
# A single pixel; fewer outputs than a tile; more tiles than one product has, and rows; runs of
# slices over several images; channels and outputs that fill vectors, and not.
SHAPES: tuple[tuple[Pixels, int, int], ...] = (
    ((1, 1, 1, 1), 1, 8),
    ((2, 5, 9, 11), 2, 20),
    ((1, 2, 6, 600), 1, 24),
    ((1, 3, 290, 5), 1, 16),
    ((9, 7, 8, 33), 1, 64),
    ((1, 40, 3, 70), 4, 5),
    ((2, 31, 66), 3, 40),
    ((3, 57), 2, 33),
)


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    with use_backend("cpu"):
        yield


def operands(
    pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Case, dict[str, Tensor]]:
    case = Case(dtype, seed)
    halved = (pixels[0], *((size + 1) // 2 for size in pixels[1:]))
    weight = case.weight(outputs, channels, *(7,) * (len(pixels) - 1))
    rows = {
        "images": case.rows(pixels, channels),
        "out": case.rows(halved, outputs),
        "grad_out": case.rows(halved, outputs),
    }
    return case, {**rows, "weight": weight, "grad_weight": torch.empty_like(weight)}


def run(of: dict[str, Tensor]) -> None:
    operators.stem_convolution_forward(of["images"], of["weight"], of["out"])
    operators.stem_convolution_backward(
        of["grad_out"], of["images"], of["weight"], of["grad_weight"]
    )


def plain(of: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and gradient of the weight by PyTorch, in this type."""
    images, grad_out = (nchw(of[name].to(dtype)) for name in ("images", "grad_out"))
    weight = of["weight"].to(dtype).requires_grad_()
    out = CONVOLUTIONS[images.dim() - 3](images, weight, stride=2, padding=3)
    (grad_weight,) = torch.autograd.grad(out, weight, grad_out)
    return nhwc(out.detach()), grad_weight


def check(pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int = 0) -> None:
    case, of = operands(pixels, channels, outputs, dtype, seed)
    run(of)
    out, grad_weight = plain(of, torch.float64)
    assert_close("out", of["out"], out, dtype, of["weight"][0].numel())
    assert_close("grad_weight", of["grad_weight"], grad_weight, dtype, out[..., 0].numel())
    case.assert_guards()


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize(("pixels", "channels", "outputs"), SHAPES, ids=str)
def test_against_pytorch(pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype) -> None:
    check(pixels, channels, outputs, dtype)


@pytest.mark.parametrize("isa", build_info()["cpu_isa_usable"] if extension.LOADED else [])
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    from densenet_fast import _C

    before = _C.isa_in_use()
    _C.set_isa(isa)
    try:
        for shape in SHAPES[:5]:
            check(*shape, dtype)
    finally:
        _C.set_isa(before)


@given(
    pixels=st.tuples(st.integers(1, 3), *(st.integers(1, 20) for _ in range(3))),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_any_shape(pixels: Pixels, channels: int, outputs: int, seed: int) -> None:
    with use_backend("cpu"):
        check(pixels, channels, outputs, torch.float64, seed)


@pytest.mark.parametrize("pixels", [(1, 24, 24, 24), (8, 32, 32, 32), (2, 20, 18, 34)], ids=str)
@pytest.mark.parametrize("outputs", [24, 64])
def test_as_accurate_as_plain_float32(pixels: Pixels, outputs: int) -> None:
    """Root mean square errors are at most twice those of PyTorch, whose sums are direct.

    Of shapes that PyTorch computes: oneDNN's gradients of few slices are NaN, or end the process.
    """
    channels = 1
    _, of = operands(pixels, channels, outputs, torch.float32)
    run(of)
    found = of["out"], of["grad_weight"]
    for actual, theirs, exact in zip(
        found, plain(of, torch.float32), plain(of, torch.float64), strict=True
    ):
        errors = [float((t.double() - exact).square().mean().sqrt()) for t in (actual, theirs)]
        assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(("pixels", "channels", "outputs"), SHAPES[:6], ids=str)
def test_same_bits_for_any_number_of_threads(pixels: Pixels, channels: int, outputs: int) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        _, of = operands(pixels, channels, outputs, torch.float32)
        run(of)
        results.append(of)
    torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("out", "grad_weight"):
            assert torch.equal(other[name], results[0][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_weights(dtype: torch.dtype) -> None:
    """The same bits of channels_last weights, and of float32 weights of bfloat16 images."""
    _, of = operands((2, 5, 9, 11), 3, 20, dtype)
    run(of)
    for weight in (
        of["weight"].contiguous(memory_format=torch.channels_last_3d),
        of["weight"].float(),
    ):
        other = {**of, "out": torch.empty_like(of["out"]), "weight": weight}
        other["grad_weight"] = torch.empty_like(weight)
        run(other)
        assert torch.equal(other["out"], of["out"])
        assert torch.equal(other["grad_weight"].to(dtype), of["grad_weight"])


def refused(match: str, **changed: Tensor) -> None:
    _, of = operands((2, 5, 9, 11), 2, 20, torch.float32)
    before = of["out"].clone()
    with pytest.raises(RuntimeError, match=match):
        run({**of, **changed})
    # The first of the two operators has checked before it wrote; the second has not been reached.
    assert "grad_out" in changed or "grad_weight" in changed or torch.equal(of["out"], before)


def test_wrong_arguments_are_refused() -> None:
    refused("`weight` should have 7 elements in every dimension", weight=torch.ones(20, 2, 7, 7, 5))
    refused("`weight` should have 2 input channels", weight=torch.ones(20, 3, 7, 7, 7))
    refused(r"`out` should have shape \[2, 3, 5, 6, 20\]", out=torch.ones(2, 5, 9, 11, 20))
    refused(r"`grad_out` should have shape \[2, 3, 5, 6, 20\]", grad_out=torch.ones(2, 3, 5, 6, 19))
    refused("`grad_weight` should have", grad_weight=torch.ones(20, 2, 7, 7, 5))
    refused("`weight` should have type Double", images=torch.ones(2, 5, 9, 11, 2).double())
    refused("should have at least one element", images=torch.ones(0, 5, 9, 11, 2))


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
def test_opcheck_and_fake_tensors(dtype: torch.dtype) -> None:
    _, of = operands((2, 5, 9, 11), 2, 20, dtype)
    ops = torch.ops.densenet_fast
    forward = of["images"], of["weight"], of["out"]
    backward = of["grad_out"], of["images"], of["weight"], of["grad_weight"]
    for op, arguments in (
        (ops.stem_convolution_forward.default, forward),
        (ops.stem_convolution_backward.default, backward),
    ):
        torch.library.opcheck(op, arguments)
        with FakeTensorMode() as mode:
            assert op(*(tree_map_only(Tensor, mode.from_tensor, t) for t in arguments)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definition(dtype: torch.dtype) -> None:
    _, of = operands((2, 8, 9, 12), 1, 24, dtype)
    with use_backend("reference"):
        run(of)
    out, grad_weight = plain(of, torch.float64)
    assert_close("out", of["out"], out, dtype, 7**3)
    assert_close("grad_weight", of["grad_weight"], grad_weight, dtype, out[..., 0].numel())
