"""Plans are kept between calls, and whatever changes in between is noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from library_networks import make
from torch import Tensor, nn

import densenet_fast
from densenet_fast import EfficientDenseNet
from densenet_fast.modules import fusing, kept_plans
from densenet_fast.operators.backends import Setting, use_backend

SHAPE = (2, 3, 40, 40)


def network() -> EfficientDenseNet:
    torch.manual_seed(0)
    return EfficientDenseNet(4, (2, 2), 6, bn_size=2, num_classes=3).double()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def layer(model: Any) -> Any:
    return model.features.denseblock1.denselayer2


def hook(model: Any) -> None:
    layer(model).norm2.register_forward_hook(lambda *given: given[-1] + 1)


def backward_hook(model: Any) -> None:
    layer(model).conv1.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],))


def own_forward(model: Any) -> None:
    layer(model).forward = lambda given: torch.cat((given, given[:, :4]), 1)


def other_layer(model: Any) -> None:
    torch.manual_seed(2)
    model.features.denseblock1.denselayer2 = nn.Conv2d(10, 14, 1).double()


def other_class(model: Any) -> None:
    class Twice(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer(model).norm1.__class__ = Twice


def other_order(model: Any) -> None:
    modules = model.features._modules
    modules["norm5"] = modules.pop("norm5")
    block = model.features.denseblock2._modules
    block["denselayer2"] = block.pop("denselayer2")


def other_weight(model: Any) -> None:
    layer(model).conv2.weight = nn.Parameter(torch.ones_like(layer(model).conv2.weight))


def other_values(model: Any) -> None:
    with torch.no_grad():
        layer(model).conv2.weight.add_(1)
        layer(model).norm1.weight.mul_(3)


def other_statistics(model: Any) -> None:
    layer(model).norm1.running_mean = torch.ones(10, dtype=torch.float64)


def no_statistics(model: Any) -> None:
    layer(model).norm2.running_mean = layer(model).norm2.running_var = None


def settings(model: Any) -> None:
    layer(model).norm1.eps = 0.1
    layer(model).norm2.momentum = 0.5


def cumulative(model: Any) -> None:
    layer(model).norm1.momentum = None


def untracked(model: Any) -> None:
    layer(model).norm1.track_running_stats = False


def partly_frozen(model: Any) -> None:
    layer(model).norm2.eval()


def dilated(model: Any) -> None:
    layer(model).conv2.dilation = layer(model).conv2.padding = (2, 2)


CHANGES: list[Callable[[Any], Any]] = [
    hook,
    backward_hook,
    own_forward,
    other_layer,
    other_class,
    other_order,
    other_weight,
    other_values,
    other_statistics,
    no_statistics,
    settings,
    cumulative,
    untracked,
    partly_frozen,
    dilated,
    lambda model: model.eval(),
]


def step(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    model.zero_grad()
    given = images().requires_grad_()
    output = run(given)
    output.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert given.grad is not None
    return [output.detach(), given.grad, *gradients, *model.buffers()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_are_noticed(change: Callable[[Any], Any]) -> None:
    ours = network()
    for _ in range(3):
        step(ours, ours)
    plain = copy.deepcopy(ours)
    for model in (ours, plain):
        change(model)
    for _ in range(3):  # and what has changed is planned, and kept, in its turn
        found, expected = step(ours, ours), step(plain, plain._compose)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_converted_network_and_back() -> None:
    model = make("torchvision")
    expected = model.eval()(images())
    for _ in range(2):
        densenet_fast.convert(model)
        for _ in range(3):
            torch.testing.assert_close(model(images()), expected)
        densenet_fast.revert(model)
        torch.testing.assert_close(model(images()), expected)


def plans(model: nn.Module, monkeypatch: pytest.MonkeyPatch, calls: int) -> int:
    """How often something is planned in so many calls."""
    made: list[int] = []
    original = fusing.steps

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fusing, "steps", counted)
        for _ in range(calls):
            step(model, model)
    return len(made)


def test_nothing_is_planned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    assert plans(model, monkeypatch, 5) == 2  # the first call keeps nothing
    assert plans(model, monkeypatch, 5) == 0
    model.eval()
    assert plans(model, monkeypatch, 5) == 1


def test_process_groups_are_planned_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = network()
    step(model, model)
    assert plans(model, monkeypatch, 3) == 1
    for name in ("one", "two"):
        store = dist.FileStore(str(tmp_path / name), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            assert plans(model, monkeypatch, 3) == (name == "one")
        finally:
            dist.destroy_process_group()
    assert plans(model, monkeypatch, 3) == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_weight_of_another_type_is_refused(backend: Setting) -> None:
    """Its parameter is the same object, so that the plan is kept."""
    model = network()
    with use_backend(backend):
        for _ in range(3):
            step(model, model)
        weight = layer(model).conv2.weight
        weight.data = weight.data.float()
        before = [buffer.clone() for buffer in layer(model).buffers()]
        with pytest.raises(TypeError, match=r"conv2\.weight should have the type of the input"):
            model(images())
        for buffer, expected in zip(layer(model).buffers(), before, strict=True):
            assert torch.equal(buffer, expected)
        weight.data = weight.data.double()
        step(model, model)


def test_a_network_that_always_changes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    step(model, model)
    step(model, model)
    for at in range(10):
        layer(model).norm1.eps = 1e-5 * (at + 2)
        assert plans(model, monkeypatch, 1) == 1
    assert kept_plans._entries[model].facts is None
    assert plans(model, monkeypatch, 3) == 3


def test_networks_are_not_kept_alive() -> None:
    model = network()
    for _ in range(3):
        step(model, model)
    seen = weakref.ref(model), weakref.ref(layer(model).conv1.weight)
    del model
    gc.collect()
    assert [found() for found in seen] == [None, None]


def test_copies_and_pickles_know_nothing_of_plans() -> None:
    model = network()
    before = set(model.__dict__)
    for _ in range(3):
        step(model, model)
    assert set(model.__dict__) == before


def test_attributes_that_cannot_be_compared() -> None:
    model = network()
    for _ in range(3):
        model.note = torch.ones(2)  # another tensor each time
        step(model, model)
    plain = copy.deepcopy(model)
    for one, other in zip(step(model, model), step(plain, plain._compose), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
