"""`convert` finds a last norm, ReLU and average over all pixels, in all its forms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import Recorder
from forms import GROWTH, START, Functional, NewestFirst, SequentialBlock, kinds, layers_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from library_networks import TOLERANCE, assert_same_step, assert_same_training, images
from torch import Tensor, nn

from benchmarks.measure import saved_for_backward
from densenet_fast import convert, fusion_report, optimize_for_inference, revert
from densenet_fast.blocks.specs import CHECKPOINT_MODES

LAYERS = 3
CHANNELS = START + GROWTH * LAYERS
WHOLE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
Flat = Callable[[Tensor], Tensor]


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


# What averages, as a function of what the norm and ReLU give. Those of the first dictionary are
# found; the other ones are near misses.
AVERAGES: dict[str, Flat] = {
    "function": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "function, sizes": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), start_dim=1),
    "method": mean,
    "method, from behind": lambda x: x.mean([-2, -1]),
    "function, kept": lambda x: torch.mean(x, dim=(2, 3), keepdim=True).flatten(1, -1),
    "copied": lambda x: x.clone().mean(dim=(2, 3)),
}
NEAR: dict[str, Flat] = {
    "maximum": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "of rows": lambda x: x.mean(2)[:, :, 0],
    "of rows, kept": lambda x: x.mean((2,), keepdim=True)[..., 0].flatten(1)[:, : x.shape[1]],
    "of channels": lambda x: x.mean((1, 2)).repeat(1, CHANNELS)[:, :CHANNELS],
    "of the last two, and more": lambda x: x.mean((1, 2, 3), keepdim=True).repeat(
        1, CHANNELS, 1, 1
    ),
    "twice": lambda x: x.mean(2).mean(2),
    "to two pixels": lambda x: F.adaptive_avg_pool2d(x, (2, 1)).flatten(1)[:, :CHANNELS],
    "to its width": lambda x: F.adaptive_avg_pool2d(x, (1, None)).flatten(1)[:, :CHANNELS],
    "in another type": lambda x: x.mean((2, 3), dtype=torch.float32).double(),
    "sum": lambda x: x.sum((2, 3)),
    "scaled": lambda x: 0.5 * x.mean((2, 3)),
    "dropped out": lambda x: F.dropout(x.mean((2, 3)), 0.5, training=False),
    "with the maximum": lambda x: x.mean((2, 3)) + x.amax((2, 3)),
    "flattened to one": lambda x: F.adaptive_avg_pool2d(x, 1).flatten().view(-1, CHANNELS),
}


class Averaging(nn.Module):
    """The end of a network: norm, ReLU and average."""

    def __init__(self, average: Flat, dims: int = 2, activation: Flat = F.relu) -> None:
        super().__init__()
        self.bn = kinds(dims)[1](CHANNELS)
        self.average, self.activation = average, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.average(self.activation(self.bn(x)))


class LastStage(nn.Module):
    """Layers, and the end behind them."""

    def __init__(self, layer: type[nn.Module] = Functional) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers_of(layer, LAYERS, START))
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.relu(self.bn(self.layers(x))), 1).flatten(1)


def network(*end: nn.Module, dims: int = 2) -> nn.Sequential:
    stem = kinds(dims)[0](3, START, 3, padding=1, bias=False)
    block = nn.Sequential(*layers_of(Functional, LAYERS, START))
    if dims != 2:
        block = SequentialBlock(LAYERS, START, dims, 0.0)
    return nn.Sequential(stem, block, *end, nn.Linear(CHANNELS, 5))


def modules(dims: int, *, flat: bool) -> list[nn.Module]:
    flatten = [nn.Flatten()] if flat else []
    return [kinds(dims)[1](CHANNELS), nn.ReLU(inplace=True), WHOLE[dims](1), *flatten]


FORMS: dict[str, Callable[[], nn.Sequential]] = {
    **{
        name: lambda average=average: network(Averaging(average))
        for name, average in AVERAGES.items()
    },
    "1-D": lambda: network(Averaging(lambda x: F.adaptive_avg_pool1d(x, 1).flatten(1), 1), dims=1),
    "3-D": lambda: network(Averaging(lambda x: x.mean((2, 3, 4)), 3), dims=3),
    "Sequential": lambda: network(nn.Sequential(*modules(2, flat=True))),
    "Sequential, kept": lambda: network(nn.Sequential(*modules(2, flat=False)), nn.Flatten()),
    "Sequential, kept, 3-D": lambda: network(
        nn.Sequential(*modules(3, flat=False)), nn.Flatten(), dims=3
    ),
    "in the network's": lambda: network(*modules(2, flat=True)),
    "in the network's, 1-D": lambda: network(*modules(1, flat=True), dims=1),
    "in the network's, 3-D": lambda: network(*modules(3, flat=True), dims=3),
    "behind layers": lambda: nn.Sequential(
        nn.Conv2d(3, START, 3, padding=1, bias=False), LastStage(), nn.Linear(CHANNELS, 5)
    ),
}


def made(form: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A network, the same as it comes, and images."""
    torch.manual_seed(0)
    one = FORMS[form]().double()
    dims = 1 if "1-D" in form else 3 if "3-D" in form else 2
    return one, copy.deepcopy(one), images(0, (2, 3, *(8, 6, 4)[:dims]))


@pytest.mark.parametrize("form", FORMS)
def test_it_runs_fused_with_the_block_before_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, reference, x = made(form)
    assert convert(one).complete
    report = fusion_report(one)
    assert report.all_fused
    assert len(report) == LAYERS + 1
    runs = Recorder(monkeypatch).runs
    assert_same_training(one, reference, x)
    assert runs == [LAYERS] * 4
    revert(one)
    assert [type(module) for module in one.modules()] == [type(m) for m in reference.modules()]


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("form", ["method", "in the network's", "behind layers"])
def test_modes_and_frozen_norms(form: str, mode: Any) -> None:
    one, reference, x = made(form)
    convert(one, checkpoint=mode)
    for part in (one, reference):
        [m for m in part.modules() if isinstance(m, nn.BatchNorm2d)][-1].eval()
    assert_same_step(one, reference, x)
    torch.testing.assert_close(optimize_for_inference(one)(x), one.eval()(x))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["method", "Sequential", "Sequential, kept"])
def test_by_itself_it_gives_what_it_gave(form: str, channels_last: bool) -> None:
    one, reference, _ = made(form)
    convert(one)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = images(1, (2, CHANNELS, 6, 5)).contiguous(memory_format=layout).requires_grad_()
    found = []
    for part in (one[2], reference[2]):
        output = part(x)
        found.append((output, torch.autograd.grad(output.square().sum(), x)[0]))
        output.detach().mul_(2)  # what it returns may be written to
    torch.testing.assert_close(*found, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(one.state_dict(), reference.state_dict())


def test_the_norm_and_relu_keep_nothing() -> None:
    one, _, x = made("in the network's")
    convert(one)
    kept = [saved_for_backward(one, lambda: one(x).sum(), x)]
    one[2].register_forward_hook(lambda *_: None)
    kept.append(saved_for_backward(one, lambda: one(x).sum(), x))
    features = len(x) * CHANNELS * x[0, 0].numel() * x.itemsize
    assert kept[1] - kept[0] >= 2 * features  # a copy of the features, and what the ReLU gives


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 1.5 * output)


def patched(module: Any) -> None:
    module.forward = lambda x, plain=module.forward: 1.5 * plain(x)


class FixedNorm(nn.BatchNorm2d):
    """One that is no plain batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


# By what is done to the modules of a Sequential from `at` on: whether it still is norm, ReLU and
# average for all that its trace tells.
CHANGES: dict[str, tuple[Callable[[Any, int], object], bool]] = {
    "hooked norm": (lambda end, at: hooked(end[at]), True),
    "hooked ReLU": (lambda end, at: hooked(end[at + 1]), True),
    "hooked average": (lambda end, at: hooked(end[at + 2]), True),
    "patched norm": (lambda end, at: patched(end[at]), True),
    "patched average": (lambda end, at: patched(end[at + 2]), False),
    "another norm": (lambda end, at: end.__setitem__(at, FixedNorm(CHANNELS).double()), True),
    "another activation": (lambda end, at: end.__setitem__(at + 1, nn.LeakyReLU()), False),
    "a maximum": (lambda end, at: end.__setitem__(at + 2, nn.AdaptiveMaxPool2d(1)), False),
    "something behind": (lambda end, at: end.insert(at + 3, nn.Tanh()), False),
    "a hooked flattening": (lambda end, at: hooked(end[at + 3]), True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["Sequential", "in the network's"])
def test_changed_behind_the_conversion_it_runs_as_it_is(form: str, change: str) -> None:
    one, reference, x = made(form)
    convert(one)
    assert_same_step(one, reference, x)
    make_change, known = CHANGES[change]
    for part in (one, reference):
        part.zero_grad()
        make_change(*((part[2], 0) if form == "Sequential" else (part, 2)))
    assert_same_step(one, reference, x)
    plain = [row.name for row in fusion_report(one) if not row.fused]
    if form == "Sequential":
        assert plain == (["2.0"] if known else ["2"])
    elif change in ("something behind", "a hooked flattening"):
        assert plain == []
    else:
        assert plain == ["2"]


def test_other_settings_are_noticed() -> None:
    for name, kind, value in (
        ("output_size", nn.AdaptiveAvgPool2d, 2),
        ("output_size", nn.AdaptiveAvgPool2d, (1, None)),
        ("start_dim", nn.Flatten, 0),
    ):
        for form in ("Sequential", "in the network's"):
            one, reference, x = made(form)
            convert(one)
            one(x)
            for part in (one, reference):
                found = next(m for m in part.modules() if isinstance(m, kind))
                setattr(found, name, value)
                part[-1] = nn.Identity()
            torch.testing.assert_close(one(x), reference(x), rtol=TOLERANCE, atol=TOLERANCE)
            assert fusion_report(one).all_fused == (form != "Sequential" and kind is nn.Flatten)


@settings(max_examples=25, deadline=None)
@given(
    average=st.sampled_from((*AVERAGES, *NEAR)),
    activation=st.sampled_from(("ReLU", "leaky", "none", "twice", "of both")),
    options=st.sampled_from(({}, {"affine": False}, {"momentum": None}, {"eps": 0.1})),
    evaluating=st.booleans(),
    seed=st.integers(0, 99),
)
@example("method", "ReLU", {"track_running_stats": False}, False, 0)
@example("method", "none", {}, False, 0)
def test_any_end_runs_as_before(
    average: str, activation: str, options: dict[str, Any], evaluating: bool, seed: int
) -> None:
    activations: dict[str, Flat] = {
        "ReLU": F.relu,
        "leaky": F.leaky_relu,
        "none": lambda x: x,
        "twice": lambda x: F.relu(F.relu(x)),
        "of both": lambda x: F.relu(x) + x,
    }
    torch.manual_seed(seed)
    end = Averaging({**AVERAGES, **NEAR}[average], activation=activations[activation])
    end.bn = nn.BatchNorm2d(CHANNELS, **options)
    one = network(end, nn.Flatten()).double()
    for module in one.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    reference = copy.deepcopy(one.train(not evaluating))
    names = [row.name for row in convert(one) if row.converted]
    usual = average in AVERAGES and activation == "ReLU"
    assert names == (["1", "2"] if usual else ["1"])
    assert_same_step(one, reference, images(seed, (2, 3, 6, 5)))


@pytest.mark.parametrize("average", NEAR)
def test_near_misses_are_left_alone(average: str) -> None:
    torch.manual_seed(0)
    one = network(Averaging(NEAR[average]), nn.Flatten()).double()
    reference = copy.deepcopy(one)
    report = convert(one)
    assert [row.name for row in report] == ["1"]
    assert [row.name for row in fusion_report(one)] == [f"1.{at}" for at in range(LAYERS)]
    assert_same_step(one, reference, images(0, (2, 3, 6, 5)))


def test_modules_in_another_order_or_too_few_are_left_alone() -> None:
    norm, relu, pool, flatten = modules(2, flat=True)
    for end in (
        (norm, pool, flatten),
        (relu, norm, pool, flatten),
        (norm, relu, nn.Identity(), pool, flatten),
        (norm, relu, nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2), flatten),
        (norm, relu, nn.AdaptiveMaxPool2d(1), flatten),
    ):
        one = copy.deepcopy(network(*end)).double()
        reference = copy.deepcopy(one)
        convert(one)
        assert not any(row.fused for row in fusion_report(one) if "." not in row.name)
        assert_same_step(one, reference, images(0, (2, 3, 6, 5)))
    short = network(norm, pool).double()[:-1]  # ends with these
    reference = copy.deepcopy(short)
    convert(short)
    x = images(0, (2, 3, 6, 5))
    torch.testing.assert_close(short(x), reference(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_features_in_another_order() -> None:
    """The block runs fused, and what reads its features as it did."""
    for end in (modules(2, flat=True), [Averaging(AVERAGES["method"])]):
        one = network(*end)
        one[1] = nn.Sequential(*layers_of(NewestFirst, LAYERS, START))
        one.double()
        reference = copy.deepcopy(one)
        convert(one)
        assert_same_step(one, reference, images(0, (2, 3, 6, 5)))
    stage = LastStage(NewestFirst)
    assert [(row.name, row.reason) for row in convert(stage)] == [("layers", None)]


def test_an_average_alone_is_of_no_interest() -> None:
    with pytest.raises(ValueError, match="found no dense block"):
        convert(nn.Sequential(Averaging(AVERAGES["method"]), nn.Linear(CHANNELS, 2)))


def test_a_norm_of_any_dimensions_averages_those_of_the_trace() -> None:
    """Sequences' and volumes' pixels are not those that the forward averages."""
    end = Averaging(AVERAGES["method"])
    end.bn = nn.SyncBatchNorm(CHANNELS)
    one = network(end).double()
    reference = copy.deepcopy(one)
    assert convert(one).complete
    assert_same_step(one, reference, images(0, (2, 3, 6, 5)))
    volumes = images(0, (2, CHANNELS, 4, 3, 5))
    found, expected = one[2](volumes), reference[2](volumes)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.shape == (2, CHANNELS, 5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", ["method", "Sequential, kept", "in the network's"])
def test_files_and_graphs(form: str) -> None:
    one, reference, x = made(form)
    convert(one)
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert fusion_report(copied).all_fused
        assert_same_step(copied, copy.deepcopy(reference), x)
    for part in (one, reference):
        part.zero_grad()
    graph = torch.compile(one, backend="aot_eager", fullgraph=True)
    assert_same_step(graph, reference, x)
    one.eval()
    exported = torch.export.export(one, (x,))
    assert not any("densenet_fast" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), one(x), rtol=TOLERANCE, atol=TOLERANCE)
