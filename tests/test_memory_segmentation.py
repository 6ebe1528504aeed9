"""What `densenet_fast.memory` says of an FC-DenseNet's step, against what it takes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.children import call_in_child
from benchmarks.measure import sample_memory, saved_for_backward
from benchmarks.memory import CHILD_ENVIRONMENT, autocast
from densenet_fast import DenseBlock, FCDenseNet, fcdensenet103
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.memory import DoesNotFitError, MemoryEstimate, estimate

CPU = torch.device("cpu")
# Layers of the blocks on the way down, between and up; channels of the first convolution.
NETWORKS = {
    "usual": ((4, 5), 6, (5, 4), 48),
    "odd": ((1, 2), 1, (2, 1), 19),
    "wide middle": ((1,), 40, (1,), 16),  # fullest in a transposed convolution's backward
}
SHAPES = {1: (1, 3, 60000), 2: (2, 3, 132, 132), 3: (2, 3, 28, 28, 28)}
CLASSES = 11


def network(kind: str, dims: int, mode: str, dtype: torch.dtype = torch.float32) -> FCDenseNet:
    torch.manual_seed(0)
    made = FCDenseNet(CLASSES, 16, *NETWORKS[kind], 0.2, spatial_dims=dims).to(dtype)
    for module in made.modules():
        if isinstance(module, DenseBlock):
            module.checkpoint = mode  # type: ignore[assignment]
    return made


def forward(model: nn.Module, images: Tensor, amp: str) -> Tensor:
    labels = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
    with autocast(CPU, amp):
        return F.cross_entropy(model(images), labels)


def predicted(model: FCDenseNet, shape: tuple[int, ...], amp: str) -> MemoryEstimate:
    with autocast(CPU, amp):
        return estimate(model, shape)


def peaks(kind: str, shape: tuple[int, ...], mode: str, amp: str, dtype: str) -> list[int]:
    """Measured in this process, behind a step that made all scratch; gradients freed, allocated."""
    torch.set_num_threads(1)
    kept: torch.dtype = getattr(torch, dtype)
    model, images = network(kind, len(shape) - 2, mode, kept), torch.randn(shape, dtype=kept)
    forward(model, images, amp).backward()
    found = []
    for freed in (True, False):
        model.zero_grad(set_to_none=freed)
        step = sample_memory(lambda: forward(model, images, amp).backward(), CPU)
        found.append(step.peak_above_rest)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
@pytest.mark.usefixtures("forked_children")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dims", "mode", "amp", "dtype"),
    [
        *(("usual", 2, mode, "none", "float32") for mode in CHECKPOINT_MODES),
        ("usual", 2, "bottleneck", "bfloat16", "float32"),
        ("usual", 2, "bottleneck", "none", "float64"),
        ("wide middle", 2, "bottleneck", "none", "float32"),
        ("usual", 1, "bottleneck", "none", "float32"),
        *(("usual", 3, mode, "none", "float32") for mode in CHECKPOINT_MODES),
        ("usual", 3, "bottleneck", "bfloat16", "float32"),
    ],
)
def test_peak_is_within_five_percent_of_the_one_measured(
    kind: str, dims: int, mode: str, amp: str, dtype: str
) -> None:
    shape = SHAPES[dims]
    case = {"kind": kind, "shape": shape, "mode": mode, "amp": amp, "dtype": dtype}
    freed, allocated = call_in_child(
        "test_memory_segmentation:peaks", case, threads=1, environment=CHILD_ENVIRONMENT
    )
    model = network(kind, dims, mode, getattr(torch, dtype))
    assert predicted(model, shape, amp).peak == pytest.approx(freed, rel=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert predicted(model, shape, amp).peak == pytest.approx(allocated, rel=0.05)


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_kept_bytes_are_those_that_autograd_keeps(
    kind: str, dims: int, mode: str, amp: str
) -> None:
    model, images = network(kind, dims, mode), torch.randn(2, 3, *(13, 18, 7)[:dims])
    expected = predicted(model, images.shape, amp)
    assert expected.kept == saved_for_backward(model, lambda: forward(model, images, amp), images)
    assert expected.kept == sum(part.kept for part in expected.parts)
    assert expected.peak >= max(part.peak for part in expected.parts)


def test_evaluation_draws_no_dropout() -> None:
    model, images = network("usual", 2, "bottleneck").eval(), torch.randn(2, 3, 13, 18)
    kept = saved_for_backward(model, lambda: forward(model, images, "none"), images)
    assert estimate(model, images.shape).kept == kept


def test_a_network_of_no_memory_part_by_part() -> None:
    with torch.device("meta"):
        model = fcdensenet103(11)
    report = estimate(model, (2, 3, 224, 224))
    assert [part.name for part in report.parts] == [
        "stem",
        *(f"down_blocks.{level}" for level in range(5)),
        "bottleneck",
        *(f"up_blocks.{level}" for level in range(5)),
        "classifier",
    ]
    assert max(report.parts, key=lambda part: part.peak).name == "up_blocks.4"
    assert report.kept == estimate(model, (2, 3, 224, 224), checkpoint="none").kept
    assert report.kept < estimate(model, (2, 3, 224, 224), checkpoint="block").kept


def test_a_budget_is_kept_to_or_not() -> None:
    model, shape = network("usual", 2, "bottleneck"), (2, 3, 64, 64)
    peak = estimate(model, shape).peak
    assert estimate(model, shape, checkpoint="auto", memory_budget=peak).peak == peak
    with pytest.raises(DoesNotFitError) as caught:
        estimate(model, shape, checkpoint="auto", memory_budget=peak - 1)
    assert caught.value.needed == peak


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("conv0", nn.Identity()),
        ("down_blocks.1", nn.Identity()),
        ("down_blocks.0.denselayer2", nn.Identity()),
        ("transitions_down.0.drop", nn.Identity()),
        ("transitions_up.0", nn.Identity()),
        ("transitions_up.1.conv", nn.Identity()),
        ("bottleneck", nn.Identity()),
        ("up_blocks.1", nn.Identity()),
        ("classifier", None),
    ],
)
def test_networks_with_other_parts_are_refused(name: str, made: nn.Module | None) -> None:
    model = network("usual", 2, "bottleneck")
    if made is None:
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    else:
        model.set_submodule(name, made)
    with pytest.raises(RuntimeError, match="run fused throughout alone"):
        estimate(model, (2, 3, 64, 64))


def test_shapes_that_do_not_fit() -> None:
    model = network("usual", 2, "bottleneck")
    for shape, words in (
        ((2, 4, 64, 64), "expects 3 input channels, got 4"),
        ((2, 3, 3, 64), "images too small for its pooling: 3×64, expected at least 4×4"),
        ((2, 3, 64), r"must be \(N, C, H, W\), got \(2, 3, 64\)"),
    ):
        with pytest.raises(ValueError, match=words):
            estimate(model, shape)
