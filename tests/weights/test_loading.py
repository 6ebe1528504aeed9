"""A state dict that does not fit leaves the network as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import SMALL, networks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from weight_files import State, assert_unchanged, snapshot

from densenet_fast.modules.densenet import EfficientDenseNet


def small(**kwargs: Any) -> EfficientDenseNet:
    return EfficientDenseNet(**{**SMALL, **kwargs})


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


LAST = "features.norm5.weight"
WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "more classes": (lambda state: small(num_classes=6).state_dict(), "size mismatch"),
    "other growth": (lambda state: small(growth_rate=5).state_dict(), "size mismatch"),
    "fewer layers": (lambda state: small(block_config=(2, 3, 1)).state_dict(), "Missing key"),
    "more layers": (lambda state: small(block_config=(2, 3, 3)).state_dict(), "Unexpected key"),
    "other stem": (lambda state: small(small_inputs=True).state_dict(), "Missing key"),
    "missing": (lambda state: without(state, LAST), f'Missing key.*"{LAST}"'),
    "unexpected": (lambda state: {**state, "more": torch.ones(1)}, 'Unexpected key.*"more"'),
    "not a tensor": (lambda state: {**state, LAST: "weight"}, "expected torch.Tensor"),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", WRONG)
def test_state_dicts_that_do_not_fit(name: str, assign: bool) -> None:
    make, message = WRONG[name]
    network = small()
    before = snapshot(network)
    given = make(copy.deepcopy(small().state_dict()))
    with pytest.raises(RuntimeError, match=rf"(?s)Error\(s\) in loading state_dict.*{message}"):
        network.load_state_dict(given, assign=assign)
    assert_unchanged(network, before)
    network(torch.randn(2, 3, 32, 32)).sum().backward()


def test_sizes_must_fit_even_when_keys_need_not() -> None:
    network = small()
    before = snapshot(network)
    given = without(small(num_classes=6).state_dict(), LAST)
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_state_dict(given, strict=False)
    assert_unchanged(network, before)


def test_errors_of_hooks_change_nothing() -> None:
    network = small()
    before = snapshot(network)

    def refuse(module: nn.Module, keys: Any) -> None:
        raise ArithmeticError("refused")

    network.register_load_state_dict_post_hook(refuse)
    with pytest.raises(ArithmeticError, match="refused"):
        network.load_state_dict(small().state_dict())
    assert_unchanged(network, before)


class Refusing(nn.Linear):
    """Another's module, with a loading of its own."""

    def _load_from_state_dict(self, *given: Any) -> None:
        raise ArithmeticError("refused")


def test_errors_of_modules_that_load_otherwise_change_nothing() -> None:
    network = small()
    given = small().state_dict()
    network.classifier = Refusing(network.classifier.in_features, network.classifier.out_features)
    before = snapshot(network)
    with pytest.raises(ArithmeticError, match="refused"):
        network.load_state_dict(given)
    assert_unchanged(network, before)


def test_what_fits_is_loaded_as_ever() -> None:
    expected, ours = networks()
    given = without(expected.state_dict(), LAST)
    keys = ours.load_state_dict({**given, "more": torch.ones(1)}, strict=False)
    assert keys.missing_keys == [LAST]
    assert keys.unexpected_keys == ["more"]
    ours.load_state_dict(expected.state_dict(), assign=True)
    assert ours.classifier.bias.data_ptr() == expected.classifier.bias.data_ptr()
    with torch.device("meta"):
        unborn = small().double()
    unborn.load_state_dict(expected.state_dict(), assign=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(unborn.eval()(images), ours.eval()(images))


class Clones(TorchDispatchMode):
    """Counts tensors that are kept aside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cast", [Tensor.float, Tensor.double, Tensor.half])
def test_what_surely_fits_is_loaded_without_a_copy_aside(cast: Callable[[Tensor], Tensor]) -> None:
    network, given = small(), small().state_dict()
    given.update({key: cast(value) for key, value in given.items() if value.is_floating_point()})
    with Clones() as clones:
        network.load_state_dict(given)
    assert clones.count == 0
    assert all(
        torch.equal(value, given[key].to(value)) for key, value in network.state_dict().items()
    )


@pytest.mark.parametrize("bad", [Tensor.to_sparse, lambda bias: bias.to("meta")])
def test_copies_that_fail_change_nothing(bad: Callable[[Tensor], Tensor]) -> None:
    network, given = small(), small().state_dict()
    given["classifier.bias"] = bad(given["classifier.bias"])
    before = snapshot(network)
    with pytest.raises(RuntimeError, match="While copying the parameter"):
        network.load_state_dict(given)
    assert_unchanged(network, before)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_errors_change_nothing_where_pytorch_swaps_parameters(
    assign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    network, given = small(), {**small().double().state_dict(), "more": torch.ones(1)}
    before, kept = snapshot(network), copy.deepcopy(given)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict(given, assign=assign)
    assert_unchanged(network, before)
    assert all(torch.equal(value, kept[key]) for key, value in given.items())
