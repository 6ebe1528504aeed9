"""MONAI's networks on sequences, images and volumes, converted and as they came."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from library_networks import EDGES, assert_same_step, assert_same_training
from library_networks import sized_images as images
from torch import nn

from densenet_fast import EfficientDenseNet, convert, fusion_report, load_weights, revert
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.operators.rows import channels_last_format

nets = pytest.importorskip("monai.networks.nets")

DIMENSIONS = pytest.mark.parametrize("dims", [1, 2, 3])


def network(dims: int, blocks: tuple[int, ...] = (2, 2), **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    shape = {"init_features": 6, "growth_rate": 4, "block_config": blocks, "bn_size": 2}
    return nets.DenseNet(dims, 2, 3, **shape, **changes).double()


def pair(dims: int, *args: Any, checkpoint: Checkpoint = "bottleneck", **changes: Any) -> Any:
    """A network as it came and a converted copy."""
    expected = network(dims, *args, **changes)
    model = copy.deepcopy(expected)
    assert convert(model, checkpoint=checkpoint).complete
    return model, expected


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@DIMENSIONS
def test_steps_are_the_same(dims: int, checkpoint: Checkpoint) -> None:
    model, expected = pair(dims, checkpoint=checkpoint)
    assert fusion_report(model).all_fused
    assert_same_training(model, expected, images(dims))


@pytest.mark.parametrize("blocks", [(2,), (1, 2)], ids=str)
@pytest.mark.parametrize("size", [(17,), (5, 64), (5, 64, 3), (1, 12, 9), (6, 5, 1)], ids=str)
def test_odd_and_flat_images(size: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    if len(blocks) > 1 and min(size) < 5:  # nothing is left to pool
        model, expected = pair(len(size), blocks)
        for net in (model, expected):
            with pytest.raises((RuntimeError, ValueError), match=r"too small|smaller|at least 2x2"):
                net(images(len(size), edges=size))
        return
    assert_same_step(*pair(len(size), blocks), images(len(size), edges=size))


@pytest.mark.parametrize(
    ("dims", "shape"), [(1, (1, 2, 32)), (2, (1, 2, 24, 16)), (3, (1, 2, 20, 16, 24))]
)
@pytest.mark.parametrize("kind", ["DenseNet121", "DenseNet169"])
def test_named_networks(kind: str, dims: int, shape: tuple[int, ...]) -> None:
    """One input, in evaluation, as MONAI's own tests have it."""
    made = getattr(nets, kind)
    torch.manual_seed(0)
    small: dict[str, Any] = {"init_features": 8, "growth_rate": 4, "block_config": (2, 1, 2)}
    model = made(spatial_dims=dims, in_channels=2, out_channels=3, **small).double().eval()
    input = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = model(input)
        assert convert(model).complete
        assert fusion_report(model).all_fused
        output = model(input)
    assert output.shape == (1, 3)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@DIMENSIONS
def test_reverting(dims: int) -> None:
    model, expected = pair(dims)
    keys, types = list(model.state_dict()), [type(m) for m in expected.modules()]
    assert keys == list(expected.state_dict())
    assert [type(m) for m in model.modules()] != types
    expected.load_state_dict(model.state_dict())
    revert(model)
    assert [type(m) for m in model.modules()] == types
    assert_same_step(model, expected, images(dims))


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@DIMENSIONS
def test_dropout_runs_fused(dims: int, checkpoint: Checkpoint) -> None:
    """Whole channels of an image in two and three dimensions, elements in one."""
    model, expected = pair(dims, dropout_prob=0.5, checkpoint=checkpoint)
    assert fusion_report(model).all_fused
    block = model.features.denseblock1
    x = torch.randn(3, 6, *EDGES[:dims], dtype=torch.float64)
    torch.manual_seed(1)
    output = block(x)
    growth = output[:, 6:].detach().flatten(2)
    zeros = (growth == 0).double().mean(2)
    if dims == 1:
        assert ((zeros > 0) & (zeros < 1)).all()
    else:
        assert set(zeros.unique().tolist()) == {0.0, 1.0}
        # What is kept of the first layer is twice what evaluation of the dropout would give.
        for layer in expected.features.denseblock1.children():
            layer.layers.dropout.eval()
        whole = expected.features.denseblock1(x)[:, 6:10].detach().flatten(2)
        first, kept = growth[:, :4], zeros[:, :4] == 0
        torch.testing.assert_close(first[kept], 2 * whole[kept], rtol=1e-9, atol=1e-9)
    output.square().sum().backward()
    torch.manual_seed(1)
    assert torch.equal(block(x), output)
    assert torch.equal(model.eval()(images(dims)), model(images(dims)))


def test_dropout_of_another_kind_runs_plain() -> None:
    model, _ = pair(3, dropout_prob=0.5)
    first, second = model.features.denseblock1.children()
    first.layers.dropout = nn.Dropout2d(0.5)
    second.layers.dropout = nn.AlphaDropout(0.5)
    report = fusion_report(model)
    for name, kind in (("denselayer1", "Dropout2d"), ("denselayer2", "AlphaDropout")):
        reason = f"dropout is a {kind}, not a Dropout3d"
        assert report[f"features.denseblock1.{name}"].reason == reason


@DIMENSIONS
def test_hooked_layers(dims: int) -> None:
    model, expected = pair(dims)
    seen: list[tuple[torch.Size, bool]] = []
    for net in (model, expected):
        layer = net.features.denseblock1.denselayer2
        layer.register_forward_hook(
            lambda _, args, output: seen.append((output.shape, output.is_contiguous()))
        )
    assert_same_step(model, expected, images(dims))
    assert seen[0] == seen[1]


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """With one PyTorch leaves some small convolutions of volumes, and their layout, to itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@DIMENSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("_two_threads")
def test_layouts_are_the_librarys(dims: int, dtype: torch.dtype) -> None:
    model, expected = (net.to(dtype) for net in pair(dims))
    x = images(dims).to(dtype).repeat_interleave(7, 1)
    channels = {"features": 2, "features.denseblock1": 6, "features.transition1": 14}
    for layout in {torch.contiguous_format, channels_last_format(dims + 2)}:
        for name, count in channels.items():
            input = x[:, :count].contiguous(memory_format=layout)
            output, exact = (net.get_submodule(name)(input) for net in (model, expected))
            assert output.stride() == exact.stride()


@DIMENSIONS
def test_metadata_stay(dims: int) -> None:
    tensors = pytest.importorskip("monai.data.meta_tensor")
    model, expected = pair(dims)
    x = tensors.MetaTensor(images(dims), meta={"name": "scan"})
    output = model(x)
    assert type(output) is tensors.MetaTensor
    assert output.meta["name"] == "scan"
    exact = expected(images(dims))
    torch.testing.assert_close(output.as_tensor(), exact, rtol=1e-9, atol=1e-9)


@DIMENSIONS
def test_weights_for_our_network(dims: int, tmp_path: Path) -> None:
    expected = network(dims).eval()
    torch.save(expected.state_dict(), tmp_path / "weights.pt")
    shape: dict[str, Any] = {"in_channels": 2, "num_classes": 3, "bn_size": 2}
    ours = EfficientDenseNet(4, (2, 2), 6, spatial_dims=dims, **shape).double().eval()
    load_weights(ours, tmp_path / "weights.pt")
    torch.testing.assert_close(ours(images(dims)), expected(images(dims)), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@DIMENSIONS
def test_compiled(dims: int) -> None:
    torch._dynamo.reset()
    model, expected = pair(dims)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, expected, images(dims))


@pytest.mark.slow
@DIMENSIONS
def test_compiled_dropout(dims: int) -> None:
    torch._dynamo.reset()
    model, _ = pair(dims, dropout_prob=0.5)
    outputs = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        outputs.append(call(images(dims)))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


@DIMENSIONS
def test_other_inputs_get_the_librarys_errors(dims: int) -> None:
    model, expected = pair(dims)
    for x in (images(dims)[..., None], images(dims)[0, 0], images(dims)[:, :1]):
        errors = []
        for net in (model, expected):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                net(x)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_example_of_volumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parents[2] / "examples" / "volumes.py"
    monkeypatch.setattr(sys, "argv", [str(example), "1"])
    runpy.run_path(str(example))
    lines = [line for line in capsys.readouterr().out.splitlines() if ", epoch 1: loss " in line]
    as_it_is, converted = (float(line.split()[-1]) for line in lines)
    assert converted == pytest.approx(as_it_is, rel=1e-2)
