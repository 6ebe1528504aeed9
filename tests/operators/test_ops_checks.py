"""Bad arguments: a full sentence, and every output as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from devices import CPU, CUDA
from ops_arguments import ARGUMENTS, BLOCKS, arguments
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators import backends
from densenet_fast.operators.backends import (
    backend_for,
    get_backend,
    select,
    set_backend,
    use_backend,
)

compiled = pytest.mark.parametrize("backend", [CPU, CUDA], indirect=True)


@dataclass
class Fault:
    """One argument made wrong, and words of the error that names it."""

    make: Callable[[Tensor], Tensor]
    words: str


def scattered(tensor: Tensor) -> Tensor:
    """The same values at every second place."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def repeated(tensor: Tensor) -> Tensor:
    """One pixel's channels in memory, for all of them; of a vector one element."""
    one = tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() > 1 else tensor[:1]
    return one.expand(tensor.shape)


FAULTS = {
    "rank": Fault(lambda tensor: tensor[None, None], "should have"),
    "channels": Fault(lambda tensor: tensor.repeat_interleave(2, -1), "should have"),
    "dtype": Fault(lambda tensor: tensor.double(), "should have type"),
    "integers": Fault(lambda tensor: tensor.int(), "should have type|kernels compute in"),
    "device": Fault(
        lambda tensor: tensor.to("meta"), "should be on one device|no kernels for meta"
    ),
    "strides": Fault(scattered, "one pitch apart|should be contiguous"),
    "repeated": Fault(repeated, "one pitch apart|should be contiguous"),
}
# Images that set what others must be: where one is wrong, the others differ from it.
SETTING = ("features", "bottleneck", "input", "growth")
ALONE = (
    "channel_statistics",
    "dropout_",
    "norm_coefficients",
)  # their first tensor may have any size
# What the fused nodes alone call, they have checked when they began.
CHECKED = [op for op in ARGUMENTS if op not in (*BLOCKS, "update_running_statistics_")]


def wrong_arguments() -> list[Any]:
    cases = []
    for op in CHECKED:
        for name, value in arguments(op).items():
            if not isinstance(value, Tensor):
                continue
            for fault in FAULTS:
                first = name == next(iter(arguments(op)))  # decides the backend
                if first and fault in ("dtype", "integers", "device"):
                    continue
                if fault == "channels" and first and op in ALONE:
                    continue
                if fault == "rank" and (value.dim() != 4 or name in ("argmax", "grad_weight")):
                    continue  # the same numbers, in the same places
                if fault in ("strides", "repeated") and name == "weight" and value.dim() > 1:
                    continue  # a convolution's may have any
                cases.append(pytest.param(op, name, fault, id=f"{op}-{name}-{fault}"))
    return cases


def run(op: str, given: dict[str, Any]) -> None:
    getattr(operators, op)(*given.values())


@pytest.mark.parametrize(("op", "name", "fault"), wrong_arguments())
@compiled
def test_wrong_tensors_are_named_before_anything_is_written(
    backend: str, op: str, name: str, fault: str
) -> None:
    given = arguments(op)
    value, words = given[name], FAULTS[fault].words
    assert isinstance(value, Tensor)
    given[name] = FAULTS[fault].make(value)
    before = {key: item.clone() for key, item in given.items() if isinstance(item, Tensor)}
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        run(op, given)
    if fault != "device" and name not in SETTING:
        assert f"`{name}`" in str(caught.value)
    for key, item in before.items():
        if item.device.type != "meta":
            assert torch.equal(given[key], item), key


@pytest.mark.parametrize("op", ["conv1x1_forward", "conv3x3_forward", "transition_forward"])
@pytest.mark.parametrize("missing", ["mean", "var"])
@compiled
def test_statistics_are_wanted_together(backend: str, op: str, missing: str) -> None:
    with pytest.raises(RuntimeError, match="`mean` and `var` should both"):
        run(op, {**arguments(op), missing: None})


@pytest.mark.parametrize("op", ["conv1x1_backward", "conv3x3_backward"])
@pytest.mark.parametrize("missing", [["grad_gamma"], ["grad_beta"], ["grad_gamma", "grad_beta"]])
@compiled
def test_gradients_of_the_data_come_with_their_sums(
    backend: str, op: str, missing: list[str]
) -> None:
    with pytest.raises(RuntimeError, match="`grad_gamma` and `grad_beta` should both"):
        run(op, {**arguments(op), **dict.fromkeys(missing)})


@pytest.mark.parametrize(
    ("op", "wrong", "words"),
    [
        ("dropout_", {"p": 1.5}, "between 0 and 1, got 1.5"),
        ("dropout_", {"p": float("nan")}, "between 0 and 1, got nan"),
    ],
)
@compiled
def test_wrong_numbers(backend: str, op: str, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(op, {**arguments(op), **wrong})


# Choice of the backend


def test_forcing_and_giving_back() -> None:
    assert get_backend() == "auto"
    with use_backend("reference"):
        assert get_backend() == "reference"
        assert select(torch.empty(1)) == "reference"
    assert get_backend() == "auto"
    with pytest.raises(ValueError, match="expected one of auto, cpu, cuda, reference, got 'gpu'"):
        set_backend("gpu")  # type: ignore[arg-type]
    assert get_backend() == "auto"


def test_a_missing_module_is_a_warning_once_and_an_error_if_forced(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(backends.extension, "LOADED", False)
    monkeypatch.setattr(backends.extension, "LOAD_ERROR", "there is none: run `pip install .`")
    monkeypatch.setattr(backends, "_warned", set())
    with use_backend("auto"):
        for dtype in (torch.float32, torch.float64):
            assert select(torch.empty(1, dtype=dtype)) == "reference"
    (warning,) = recwarn.list
    assert "reference implementation" in str(warning.message)
    assert "run `pip install .`" in str(warning.message)
    with pytest.raises(RuntimeError, match="'cpu' does not exist here: there is none"):
        set_backend("cpu")
    assert get_backend() == "auto"


def test_types_and_devices_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.extension, "LOADED", True)
    monkeypatch.setattr(backends.extension, "LOAD_ERROR", None)
    assert backend_for("cpu", torch.float32) == ("cpu", None)
    assert backend_for("cpu", torch.bfloat16) == ("cpu", None)
    choice = backend_for("cpu", torch.float16)
    assert choice.backend == "reference"
    assert "not in float16: convert" in str(choice.reason)
    assert backend_for("mps", torch.float32).backend == "reference"
    with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced, but float16"):
        select(torch.empty(1, dtype=torch.float16))
