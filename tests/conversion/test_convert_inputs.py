"""What converted networks are given besides ordinary images: the library's answer comes back."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_networks import (
    LIBRARIES,
    SHAPE,
    TOLERANCE,
    assert_same_step,
    images,
    make,
)
from torch import Tensor, nn

from densenet_fast import convert
from densenet_fast.conversion import tensor_subclasses
from densenet_fast.modules import steps as fused_steps


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[type[Tensor]]:
    """The types that fused nodes have been given, in order."""
    seen: list[type[Tensor]] = []
    run = fused_steps.fused

    def watched(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(type(input))
        return run(input, *args, **kwargs)

    monkeypatch.setattr(fused_steps, "fused", watched)
    return seen


@pytest.mark.parametrize("library", LIBRARIES)
def test_arguments_have_the_librarys_names(library: str) -> None:
    model = make(library).eval()
    modules = list(model.modules())
    names = [list(inspect.signature(module.forward).parameters) for module in modules]
    expected = model(x=images())
    convert(model)
    assert names == [list(inspect.signature(module.forward).parameters) for module in modules]
    torch.testing.assert_close(model(x=images()), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_an_exported_network_takes_the_librarys_argument() -> None:
    model = make("torchvision").eval()
    expected = model(images())
    convert(model)
    shapes = {"x": {0: torch.export.Dim("n")}}
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(images()), expected)
    assert len(exported(images(shape=(2, *SHAPE[1:])))) == 2


# Nothing


def outcome(module: nn.Module, x: Tensor) -> Any:
    """The output, or the type of error, and the buffers behind it."""
    result: Any
    try:
        result = module(x)
    except (RuntimeError, ValueError) as error:
        result = type(error)
    return [result, *module.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["", "features", "features.denseblock2", "features.transition1"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_empty_batches_are_the_librarys_matter(library: str, part: str, training: bool) -> None:
    model = make(library).train(training)
    reference = copy.deepcopy(model)
    convert(model)
    module, expected = model.get_submodule(part), reference.get_submodule(part)
    channels = next(module.parameters()).shape[0 if part.startswith("features.") else 1]
    for shape in ((0, channels, 64, 64), (2, channels, 0, 64)):
        x = images(shape=shape)
        ours, theirs = outcome(module, x), outcome(expected, x)
        assert type(ours[0]) is type(theirs[0])
        assert ours[0] is theirs[0] or torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=0, atol=0, equal_nan=True)


def test_an_empty_batch_has_no_scores() -> None:
    model = make("torchvision").eval()
    convert(model)
    assert model(images(shape=(0, 3, 64, 64))).shape == (0, 5)
    assert model(images()).shape == (SHAPE[0], 5)


# MONAI's tensors with metadata


def batch(collated: bool = True) -> Any:
    """Images with metadata: of MONAI's data loader, or one tensor with metadata of its own."""
    data = pytest.importorskip("monai.data")
    if not collated:
        return data.MetaTensor(images(), affine=2 * torch.eye(4), meta={"name": "scan"})
    single = [
        data.MetaTensor(image, meta={"name": f"scan{at}"}, applied_operations=[{"class": "Flip"}])
        for at, image in enumerate(images())
    ]
    return next(iter(data.DataLoader(data.Dataset(single), batch_size=len(single))))


def assert_same_metadata(output: Any, expected: Any) -> None:
    assert type(output) is type(expected)
    ours, theirs = vars(output), vars(expected)
    assert {key: str(value) for key, value in ours.items()} == {
        key: str(value) for key, value in theirs.items()
    }


def changed_head(model: Any) -> None:
    model.class_layers.relu = nn.SiLU()


def hooked_features(model: Any) -> None:
    model.features.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("change", [None, changed_head, hooked_features])
@pytest.mark.parametrize("collated", [True, False])
def test_metadata_of_monai(
    collated: bool, change: Callable[[Any], None] | None, fused: list[type[Tensor]]
) -> None:
    model = make("monai")
    if change is not None:
        change(model)
    reference = copy.deepcopy(model)
    convert(model)
    x = batch(collated)
    assert_same_metadata(model(x), reference(x))
    assert fused == [Tensor, Tensor]
    model.zero_grad()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for network, input in ((model, ours), (reference, theirs)):
        network(input).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)
    assert_same_step(model.eval(), reference.eval(), x)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("part", ["denseblock1", "transition1", "denseblock2", ""])
def test_metadata_through_parts(library: str, part: str, fused: list[type[Tensor]]) -> None:
    """As networks around them call them."""
    model = make(library).eval()
    reference = copy.deepcopy(model)
    convert(model)
    path = f"features.{part}".rstrip(".")
    x = batch()
    before = {"denseblock1": 1, "transition1": 2, "denseblock2": 3}.get(part, 0)
    if before:
        for name, module in reference.features.named_children():
            if name == part:
                break
            x = module(x)
    output, expected = model.get_submodule(path)(x), reference.get_submodule(path)(x)
    assert_same_metadata(output, expected)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert fused and set(fused) == {Tensor}


def test_metadata_that_are_not_tracked(fused: list[type[Tensor]]) -> None:
    data = pytest.importorskip("monai.data")
    model = make("monai")
    convert(model)
    x = batch()
    data.set_track_meta(False)
    try:
        output = model(x)
    finally:
        data.set_track_meta(True)
    assert type(output) is Tensor
    assert fused == [Tensor, Tensor]


# Tensors of unknown types


class Tagged(Tensor):
    """A tensor that computes as any other, but need not."""


@pytest.fixture
def _unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_subclasses, "_warned", set())


@pytest.mark.usefixtures("_unwarned")
@pytest.mark.parametrize("library", LIBRARIES)
def test_tensors_of_other_types_run_plain_after_a_warning(
    library: str, fused: list[type[Tensor]]
) -> None:
    model = make(library).eval()
    x = images().as_subclass(Tagged)
    expected = model(x)
    convert(model)
    with pytest.warns(RuntimeWarning, match="where their input is a Tagged: pass a plain tensor"):
        output = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert type(output) is Tagged
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not fused
