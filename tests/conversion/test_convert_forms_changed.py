"""Converted blocks of all forms whose parts, attributes or modes change behind the conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import forms
import pytest
import torch
from form_networks import FORMS, input_of, make
from library_networks import TOLERANCE, assert_same_step
from torch import nn

from densenet_fast import convert, fusion_report


def hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, output: 1.5 * output)


def patched(layer: Any) -> None:
    layer.forward = lambda x, plain=layer.forward: 1.5 * plain(x)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "hooked layer": (lambda block: hooked(block[1]), "1 has a forward hook"),
    "hooked norm": (lambda block: hooked(block[1].bn2), "norm2 has a forward hook"),
    "patched layer": (lambda block: patched(block[1]), "1 has its own forward"),
    "parametrised": (
        lambda block: nn.utils.parametrizations.weight_norm(block[1].conv1),
        "conv1 is parametrised",
    ),
    "another order": (
        lambda block: setattr(block[1], "newest_first", True),
        "",  # found again
    ),
    "another activation": (
        lambda block: setattr(block, "1", nn.Sequential(block[1], nn.Tanh())),
        "is no chain of dense layers any more: it calls 1.1 (Tanh)",
    ),
    "another layer": (lambda block: setattr(block, "1", forms.Bottle(10).double()), ""),
    "a bias": (lambda block: setattr(block[1], "conv1", nn.Conv2d(10, 8, 1).double()), ""),
    "groups": (
        lambda block: setattr(block[1], "conv1", nn.Conv2d(10, 8, 1, groups=2).double()),
        "conv1 has kernel_size (1, 1)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_blocks_run_as_they_are(change: str) -> None:
    network = make("functional")
    reference = copy.deepcopy(network)
    convert(network)
    network(input_of(network))
    reference(input_of(network))
    make_change, reason = CHANGES[change]
    for one in (network, reference):
        torch.manual_seed(2)
        make_change(one.dense1)
    assert_same_step(network, reference, input_of(network))
    rows = [row for row in fusion_report(network) if row.name.startswith("dense1")]
    assert rows
    if reason:
        assert all(not row.fused for row in rows)
        assert reason in str(rows[-1].reason)
    else:
        assert all(row.fused for row in rows)
    assert all(row.fused for row in fusion_report(network) if row.name.startswith("dense2"))


def test_dropout_follows_its_layer() -> None:
    network = FORMS["sequentials"]()
    convert(network)
    x = input_of(network).float()
    assert torch.equal(network(x), network(x))
    for module in network.modules():
        if isinstance(module, forms.SequentialLayer):
            module.drop_rate = 0.9
    assert not torch.equal(network(x), network(x))
    assert all(row.fused for row in fusion_report(network) if "norm" not in row.name)
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("rate", [0.25, 0.9])
@pytest.mark.parametrize("form", ["module", "function"])
def test_dropout_drops_its_share(form: str, rate: float) -> None:
    torch.manual_seed(0)
    layer = forms.Unit(6, rate) if form == "module" else forms.SequentialLayer(6, 2, rate)
    block = nn.Sequential(layer)
    convert(block)
    new = block(torch.randn(8, 6, 16, 16))[:, 6:]
    assert abs((new == 0).float().mean() - rate) < 0.02
    assert all(row.fused for row in fusion_report(block))


def test_dropout_between_the_convolutions_runs_fused_in_evaluation() -> None:
    network = make("wrapped, dropout")
    reference = copy.deepcopy(network)
    convert(network)
    assert {row.reason for row in fusion_report(network) if not row.fused} == {
        "it drops out between its convolutions",
        "what it belongs to runs plain: 0: it drops out between its convolutions",
    }
    x = input_of(network)
    for one in (network, reference):
        torch.manual_seed(1)
        one(x).sum().backward()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)
    network.eval()
    reference.eval()
    assert fusion_report(network).all_fused
    assert_same_step(network, reference, x)
