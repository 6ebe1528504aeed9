"""Networks and their parts on sequences, images and volumes, against MONAI's and plain ones."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from comparison import shake, tiny
from library_networks import EDGES, assert_same_step, assert_same_training
from library_networks import sized_images as images
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import densenet_fast
from densenet_fast import DenseBlock, DenseLayer, EfficientDenseNet, Transition, memory
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DIMENSIONS = pytest.mark.parametrize("dims", [1, 2, 3])
SMALL: dict[str, Any] = {"num_init_features": 6, "bn_size": 2, "num_classes": 3, "in_channels": 2}


def network(dims: int, **changes: Any) -> EfficientDenseNet:
    return tiny(spatial_dims=dims, **{**SMALL, **changes}).double()


def of_monai(ours: EfficientDenseNet, dims: int) -> nn.Module:
    """MONAI's network with the same parameters and statistics, which come in the same order."""
    nets = pytest.importorskip("monai.networks.nets")
    shape = {"init_features": 6, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2}
    made = nets.DenseNet(dims, 2, 3, **shape).double()
    values = ours.state_dict().values()
    made.load_state_dict(dict(zip(made.state_dict(), values, strict=True)))
    return made


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", [*CHECKPOINT_MODES, "auto"])
@DIMENSIONS
def test_steps_are_those_of_monai(dims: int, checkpoint: Any) -> None:
    ours = network(dims, checkpoint=checkpoint, memory_budget=2**26)
    expected = of_monai(ours, dims)
    assert_same_training(ours, expected, images(dims))
    assert densenet_fast.fusion_report(ours).all_fused


@DIMENSIONS
def test_initialisation(dims: int) -> None:
    made = EfficientDenseNet(4, (2,), spatial_dims=dims, **{**SMALL, "num_init_features": 256})
    stem = made.features.conv0.weight
    assert stem.std().item() == pytest.approx((2 / (2 * 7**dims)) ** 0.5, rel=0.1)
    assert (made.classifier.bias == 0).all()


@DIMENSIONS
def test_small_inputs(dims: int) -> None:
    ours = network(dims, small_inputs=True)
    plain = copy.deepcopy(ours)
    for module in plain.modules():  # a hooked module is called as such
        if type(module) is nn.ReLU:
            module.register_forward_hook(lambda *_: None)
    assert_same_step(ours, plain, images(dims))


@DIMENSIONS
def test_layers_blocks_and_transitions_by_themselves(dims: int) -> None:
    input = images(dims, channels=6)
    layer = DenseLayer(6, 4, 2, 0.0, spatial_dims=dims).double()
    transition = Transition(6, 3, spatial_dims=dims).double()
    block = DenseBlock(2, 6, 2, 4, 0.0, spatial_dims=dims).double()
    for module in (layer, transition, block):
        shake(module)
        plain = copy.deepcopy(module)
        assert_same(module(input), plain.plain(input))
        assert_same(module.eval()(input), plain.eval().plain(input))


@DIMENSIONS
def test_frozen_norms(dims: int) -> None:
    ours = network(dims)
    expected = of_monai(ours, dims)
    for model in (ours, expected):
        for norm in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
            norm.eval()
    assert_same_step(ours, expected, images(dims))


@DIMENSIONS
def test_synchronised_norms(dims: int) -> None:
    ours = network(dims)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    assert densenet_fast.fusion_report(synchronised).all_fused
    assert_same_step(synchronised, ours, images(dims))


@DIMENSIONS
def test_autocast(dims: int) -> None:
    ours = network(dims).float()
    exact = ours(images(dims).float())
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(images(dims).float())
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).norm() < 0.1 * exact.norm()
    output.float().sum().backward()
    assert ours.features.conv0.weight.grad.dtype == torch.float32


@DIMENSIONS
def test_hooks_and_replaced_layers(dims: int) -> None:
    ours = network(dims)
    expected = copy.deepcopy(ours)
    assert_same(ours(images(dims)), expected(images(dims)))
    seen: list[torch.Size] = []
    first = ours.features.denseblock1.denselayer2
    first.norm2.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    assert_same(ours(images(dims)), expected(images(dims)))
    assert [len(shape) for shape in seen] == [dims + 2]
    row = densenet_fast.fusion_report(ours)["features.denseblock1.denselayer2"]
    assert row.reason == "norm2 has a forward hook"
    for model in (ours, expected):
        model.features.denseblock1.denselayer1 = nn.Sequential(
            copy.deepcopy(expected.features.denseblock1.denselayer1)
        )
    assert_same(ours(images(dims)), expected(images(dims)))


def test_modules_of_other_dimensions_are_named() -> None:
    ours = network(3)
    layer = ours.features.denseblock1.denselayer2
    layer.norm2 = nn.BatchNorm2d(8).double()
    ours.features.transition1.pool = nn.AvgPool2d(2, 2)
    report = densenet_fast.fusion_report(ours)
    wrong = "norm2 is a BatchNorm2d, not a BatchNorm3d"
    assert report["features.denseblock1.denselayer2"].reason == wrong
    assert report["features.transition1"].reason == "pool is a AvgPool2d, not a AvgPool3d"
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(images(3))


# Graphs


@pytest.mark.slow
@DIMENSIONS
def test_compiled(dims: int) -> None:
    ours = network(dims)
    expected = copy.deepcopy(ours)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    inputs = [images(dims).requires_grad_() for _ in range(2)]
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for model, input in zip((compiled, expected), inputs, strict=True):
        model(input).square().sum().backward()
    assert len(graphs) == 1
    assert_same(inputs[0].grad, inputs[1].grad)
    assert_same(ours.features.conv0.weight.grad, expected.features.conv0.weight.grad)
    for one, other in zip(ours.buffers(), expected.buffers(), strict=True):
        assert_same(one, other)


@pytest.mark.slow
@DIMENSIONS
def test_compiled_for_any_size(dims: int) -> None:
    ours = network(dims, block_config=(1, 1)).eval()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for edge in (12, 17):
        input = torch.randn(2, 2, *[edge] * dims, dtype=torch.float64)
        assert_same(compiled(input), ours(input))


@DIMENSIONS
def test_exported_traced_and_scripted(dims: int) -> None:
    ours = network(dims).eval()
    input = images(dims)
    program = torch.export.export(ours, (input,))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {str(target).split(".")[0] for target in called} == {"aten"}
    expected = ours(input)
    for graph in (
        program.module(),
        torch.fx.symbolic_trace(ours),
        torch.jit.trace(ours, (input,)),
        torch.jit.script(ours),
    ):
        assert_same(graph(input), expected)


@DIMENSIONS
def test_fake_tensors(dims: int) -> None:
    with torch._subclasses.FakeTensorMode():
        made = EfficientDenseNet(4, (2, 2), spatial_dims=dims, **SMALL)
        output = made(torch.empty(2, 2, *EDGES[:dims]))
        output.sum().backward()
    assert output.shape == (2, 3)


@DIMENSIONS
def test_copies_and_files(dims: int) -> None:
    ours = network(dims, drop_rate=0.3)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        outputs = []
        for model in (ours, other):
            torch.manual_seed(3)
            outputs.append(model(images(dims)))
        assert torch.equal(*outputs)
    assert list(ours.state_dict()) == list(network(2).state_dict())


@DIMENSIONS
def test_optimized_for_inference(dims: int) -> None:
    ours = network(dims).eval()
    optimized = densenet_fast.optimize_for_inference(ours)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(optimized(images(dims)), ours(images(dims)))


# Memory


@DIMENSIONS
def test_estimates(dims: int) -> None:
    ours = network(dims)
    shape = (4, 2, *[19] * dims)
    found = {mode: memory.estimate(ours, shape, checkpoint=mode) for mode in CHECKPOINT_MODES}
    assert found["none"].kept > found["bottleneck"].kept > found["block"].kept
    rows, pixels = [part.kept for part in found["bottleneck"].parts], 4 * 5**dims
    buffer, statistics = pixels * (6 + 8) * 8, 2 * (14 + 16) * 8 + 8
    assert rows[1] == buffer + statistics
    budget = found["bottleneck"].peak
    assert memory.estimate(ours, shape, checkpoint="auto", memory_budget=budget).peak <= budget


def test_estimates_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"input_size must be \(N, C, D, H, W\), got \(2, 2, 9\)"):
        memory.estimate(network(3), (2, 2, 9))
    with pytest.raises(ValueError, match="too small for its pooling: 9×9×2, expected at least 5×5"):
        memory.estimate(network(3), (2, 2, 9, 9, 2))


# Errors


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (1, r"expects a 3-D input \[N, C, L\], got 4-D \(3, 2, 13, 1\)"),
        (2, r"expects a 4-D input \[N, C, H, W\], got 5-D \(3, 2, 13, 16, 1\)"),
        (3, r"expects a 5-D input \[N, C, D, H, W\], got 6-D"),
    ],
)
def test_other_inputs_are_refused(dims: int, words: str) -> None:
    ours = network(dims)
    with pytest.raises(ValueError, match=words):
        ours(images(dims)[..., None])
    with pytest.raises(ValueError, match=words.split(", got")[0]):
        ours.features.denseblock1(torch.zeros(2, 6, *[4] * (dims % 3 + 1)).double())
    with pytest.raises(TypeError, match=r"expects a tensor \[N, C"):
        ours(None)
    with pytest.raises(ValueError, match="without any pixel"):
        ours(images(dims)[..., :0])


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((4,), "too small for its pooling: 4, expected at least 5"),
        ((9, 4, 9), "too small for its pooling: 9×4×9, expected at least 5×5×5"),
    ],
)
def test_small_images_change_nothing(size: tuple[int, ...], words: str, mode: Checkpoint) -> None:
    ours = network(len(size), checkpoint=mode)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=words):
        ours(torch.zeros(2, 2, *size).double())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_one_value_per_channel() -> None:
    ours = network(3)
    with pytest.raises(ValueError, match=r"when training, got input size torch.Size\(\[1, 7, 1"):
        ours(torch.zeros(1, 2, 5, 5, 5).double())
    assert ours.eval()(torch.zeros(1, 2, 5, 5, 5).double()).shape == (1, 3)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (4, ValueError, "spatial_dims must be one of 1, 2, 3, got 4"),
        (0, ValueError, "spatial_dims must be at least 1, got 0"),
        (2.0, TypeError, "spatial_dims must be an integer"),
        (True, TypeError, "spatial_dims must be an integer"),
    ],
)
def test_other_arguments_are_refused(value: Any, error: type[Exception], words: str) -> None:
    for make in (
        lambda: EfficientDenseNet(spatial_dims=value),
        lambda: DenseBlock(2, 6, 2, 4, 0.0, spatial_dims=value),
        lambda: DenseLayer(6, 4, 2, 0.0, spatial_dims=value),
        lambda: Transition(6, 3, spatial_dims=value),
    ):
        with pytest.raises(error, match=words):
            make()


def test_pretrained_weights_are_for_images() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(ValueError, match="spatial_dims=3 does not fit the weights"):
        densenet_fast.densenet121(weights="DEFAULT", spatial_dims=3)
    assert densenet_fast.densenet121(spatial_dims=1).features.conv0.weight.shape == (64, 3, 7)
