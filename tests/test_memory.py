"""What `densenet_fast.memory` says before a step, against what the step then does."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
from comparison import SMALL
from torch import Tensor, nn

from benchmarks import measure, memory
from benchmarks.children import call_in_child
from benchmarks.memory import MemoryCase, measure_in_child
from benchmarks.networks import NetworkSpec, densenet_bc
from densenet_fast import densenet121
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.memory import DoesNotFitError, estimate
from densenet_fast.modules.densenet import EfficientDenseNet

CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
SPECS = {
    "with pooling": NetworkSpec("a", 32, (4, 6, 4), 64, image_size=224, batch_size=8),
    "small images": densenet_bc(40, 12, batch_size=32),
}


def network_of(spec: NetworkSpec, **settings: Any) -> EfficientDenseNet:
    return EfficientDenseNet(
        spec.growth_rate,
        spec.block_config,
        spec.num_init_features,
        num_classes=spec.num_classes,
        small_inputs=spec.small_inputs,
        **settings,
    ).to(memory_format=torch.channels_last)


def all_modes(name: str, amp: str, dtype: str) -> dict[str, dict[str, int]]:
    """Memory of a step in every mode; for a process of its own."""
    cases = {
        mode: MemoryCase(SPECS[name], f"ours-{mode}", threads=1, amp=amp, dtype=dtype)
        for mode in CHECKPOINT_MODES
    }
    return {mode: asdict(memory.measure_case(case)) for mode, case in cases.items()}


@cache
def measured_modes(name: str, amp: str, dtype: str) -> dict[str, dict[str, int]]:
    """One process for them: a case's first step makes all that it leaves for the next."""
    arguments = {"name": name, "amp": amp, "dtype": dtype}
    environment = memory.CHILD_ENVIRONMENT
    found: dict[str, dict[str, int]] = call_in_child(
        f"{__name__}:all_modes", arguments, threads=1, environment=environment
    )
    return found


@LINUX
@pytest.mark.usefixtures("forked_children")
@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize(
    ("amp", "parameters"), [("none", "float32"), ("bfloat16", "float32"), ("none", "float64")]
)
def test_peak_is_within_five_percent_of_the_one_measured(
    name: str, checkpoint: str, amp: str, parameters: str
) -> None:
    spec, dtype = SPECS[name], memory.AMP[amp]
    measured = measured_modes(name, amp, parameters)[checkpoint]
    model = network_of(spec).to(getattr(torch, parameters))
    freed = estimate(model, spec.input_shape, dtype, checkpoint)
    assert freed.peak == pytest.approx(measured["peak_gradients_freed"], rel=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    allocated = estimate(model, spec.input_shape, dtype, checkpoint)
    assert allocated.peak == pytest.approx(measured["peak_gradients_allocated"], rel=0.05)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_kept_bytes_are_those_that_autograd_keeps(
    spec: NetworkSpec, checkpoint: str, amp: str
) -> None:
    model = network_of(spec, checkpoint=checkpoint)
    images, labels = memory.make_batch(spec, torch.channels_last, CPU, 0)

    def forward() -> Tensor:
        with memory.autocast(CPU, amp):
            return nn.functional.cross_entropy(model(images), labels)

    with memory.autocast(CPU, amp):
        expected = estimate(model, spec.input_shape)
    assert expected.kept == measure.saved_for_backward(model, forward, images)
    assert expected.kept == sum(part.kept for part in expected.parts)
    assert expected.peak >= max(part.peak for part in expected.parts)


def test_a_network_of_no_memory_can_be_estimated() -> None:
    with torch.device("meta"):
        model = densenet121()
    report = estimate(model, (8, 3, 224, 224), checkpoint="none")
    real = estimate(densenet121(), (8, 3, 224, 224), checkpoint="none")
    assert [part.name for part in report.parts] == [
        "stem",
        *(f"denseblock{i}" for i in range(1, 5)),
        "classifier",
    ]
    assert report.kept == real.kept
    assert report.peak == pytest.approx(real.peak, rel=0.03)  # the kernels' workspace
    assert "denseblock4  none" in str(report)
    assert str(report).splitlines()[-1].split() == [
        "step",
        *(f"{s / 2**20:.1f}" for s in (report.kept, report.peak)),
    ]


# A budget


def peak_of(model: EfficientDenseNet, size: tuple[int, ...], **arguments: Any) -> int:
    return estimate(model, size, **arguments).peak


SIZE = (2, 3, 64, 64)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0, 1.5])
def test_auto_trains_the_same_network_within_the_budget(share: float) -> None:
    torch.manual_seed(0)
    plain = EfficientDenseNet(**SMALL).double()
    least, most = (peak_of(plain, SIZE, checkpoint=mode) for mode in ("bottleneck", "none"))
    budget = least + int(share * (most - least))
    torch.manual_seed(0)
    auto = EfficientDenseNet(**SMALL, checkpoint="auto", memory_budget=budget).double()
    planned = estimate(auto, SIZE)
    assert planned.peak <= budget
    held = [part.held for part in planned.parts if part.held is not None]
    if share >= 1:
        assert held == list(SMALL["block_config"])
        assert {part.mode for part in planned.parts} == {None, "none"}
    assert (share == 0) or sum(held) > 0
    images = torch.randn(SIZE, dtype=torch.float64)
    for network in (plain, auto):
        network(images).square().sum().backward()
    for (name, expected), got in zip(plain.named_parameters(), auto.parameters(), strict=True):
        assert expected.grad is not None
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, msg=name)
    for expected, got in zip(plain.buffers(), auto.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


@LINUX
@pytest.mark.usefixtures("forked_children")
@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_auto_takes_no_more_than_its_budget(share: float) -> None:
    """Measured as the plan counts it: in this process, behind a step that made all scratch."""
    spec = SPECS["small images"]
    model = network_of(spec)
    least, most = (
        peak_of(model, spec.input_shape, checkpoint=mode) for mode in ("bottleneck", "none")
    )
    budget = least + int(share * (most - least))
    case = MemoryCase(spec, "ours-bottleneck", threads=1, memory_budget=budget)
    measured = measure_in_child(case).peak_gradients_freed
    assert 0.8 * budget < measured <= 1.05 * budget


def test_a_budget_that_is_too_small_changes_nothing() -> None:
    model = EfficientDenseNet(**SMALL, checkpoint="auto", memory_budget=10_000)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DoesNotFitError, match="more than the memory budget of") as caught:
        model(torch.randn(SIZE))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        model(torch.randn(SIZE))  # nothing is kept: the budget is one for training
    model.memory_budget = caught.value.needed
    model(torch.randn(SIZE)).sum().backward()


def test_auto_can_be_chosen_later_and_given_up() -> None:
    model = EfficientDenseNet(**SMALL)
    with pytest.raises(ValueError, match="needs memory_budget"):
        model.checkpoint = "auto"
    assert model.checkpoint == "bottleneck"
    model.memory_budget = 2**30
    model.checkpoint = "auto"
    with pytest.raises(ValueError, match="needs memory_budget"):
        model.memory_budget = None
    assert (model.checkpoint, model.memory_budget) == ("auto", 2**30)
    assert model.features.denseblock1.checkpoint == "bottleneck"
    model.checkpoint = "block"
    model.memory_budget = None
    assert model.features.denseblock1.checkpoint == "block"


def test_auto_plans_whole_fused_networks_alone() -> None:
    model = EfficientDenseNet(**SMALL, checkpoint="auto", memory_budget=2**30)
    model.features.denseblock2.denselayer2.relu1 = nn.Identity()
    with pytest.raises(RuntimeError, match="fused throughout"):
        model(torch.randn(SIZE))
    with pytest.raises(RuntimeError, match=r"denseblock2\.denselayer2 relu1"):
        estimate(model, SIZE)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "EfficientDenseNet or FCDenseNet, got Linear"),
        ({"input_size": 224}, TypeError, r"\(N, C, H, W\), got 224"),
        ({"input_size": (2, 3, 64)}, ValueError, r"\(N, C, H, W\), got \(2, 3, 64\)"),
        ({"input_size": (2, 3, 64, 0)}, ValueError, r"input_size\[3\] must be at least 1, got 0"),
        ({"input_size": (2, 3, 64, 6.5)}, TypeError, r"input_size\[3\] must be an integer"),
        ({"input_size": (2, 4, 64, 64)}, ValueError, "expects 3 input channels, got 4"),
        ({"input_size": (2, 3, 8, 8)}, ValueError, "too small for its pooling: 8×8"),
        ({"dtype": torch.int32}, TypeError, "floating-point type of torch, got torch.int32"),
        ({"checkpoint": "layer"}, ValueError, "'block', 'auto', got 'layer'"),
        ({"checkpoint": "auto"}, ValueError, "needs memory_budget"),
        ({"checkpoint": "auto", "memory_budget": 0}, ValueError, "at least 1, got 0"),
        ({"checkpoint": "auto", "memory_budget": "4 GB"}, TypeError, "an integer, got '4 GB'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {"model": EfficientDenseNet(**SMALL), "input_size": SIZE, **arguments}
    with pytest.raises(error, match=words):
        estimate(**given)
