"""FC-DenseNet against its plain modules, and what the paper says of it (arXiv 1611.09326)."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same_gradients_in_a_graph, assert_same_steps, shake
from library_networks import assert_same_step, sized_images
from torch import Tensor, nn

import densenet_fast
from benchmarks.measure import saved_for_backward
from benchmarks.networks import NetworkSpec
from benchmarks.segmentation import PlainFCDenseNet
from densenet_fast import FCDenseNet
from densenet_fast.blocks.dense_block import backward_reads
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SPEC = NetworkSpec("FC-DenseNet", 4, (2, 1, 3, 2, 1), 6, 0, 0, num_classes=5, in_channels=2)
EDGES = (13, 18, 7)


def network(drop_rate: float = 0.0, dims: int = 2) -> FCDenseNet:
    torch.manual_seed(0)
    made = FCDenseNet(5, 4, *SPEC.paths, 6, drop_rate, in_channels=2, spatial_dims=dims).double()
    shake(made)
    return made


def plain(ours: FCDenseNet) -> PlainFCDenseNet:
    changes: dict[str, Any] = {"dims": ours.spatial_dims}
    made = PlainFCDenseNet(NetworkSpec(**{**vars(SPEC), **changes})).double()
    made.load_state_dict(ours.state_dict())
    return made


def images(dims: int = 2, count: int = 2) -> Tensor:
    return sized_images(dims, count, edges=EDGES)


def set_mode(ours: FCDenseNet, mode: Checkpoint) -> None:
    for module in ours.modules():
        if isinstance(module, densenet_fast.DenseBlock):
            module.checkpoint = mode


@pytest.mark.parametrize(
    ("dims", "mode"), [*((2, mode) for mode in CHECKPOINT_MODES), (1, "block"), (3, "none")]
)
def test_training_is_the_plain_one(dims: int, mode: Checkpoint) -> None:
    ours = network(dims=dims)
    set_mode(ours, mode)
    assert densenet_fast.fusion_report(ours).all_fused
    assert_same_steps((plain(ours), ours), images(dims).shape)


def test_frozen_norms_and_parts_that_want_no_gradient() -> None:
    ours = network()
    expected = plain(ours)
    for model in (ours, expected):
        model.transitions_down[0].norm.eval()
        model.up_blocks[0].denselayer2.norm1.eval()
        model.transitions_down[1].conv.requires_grad_(False)
        model.conv0.requires_grad_(False)
        model(images()).square().sum().backward()
    for (name, one), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (name in ("transitions_down.1.conv.weight", "conv0.weight"))
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_dropout_is_drawn_from_torch_s_generator() -> None:
    found = []
    for mode in CHECKPOINT_MODES:
        ours = network(drop_rate=0.5)
        set_mode(ours, mode)
        torch.manual_seed(3)
        output = ours(images())
        found.append((output, *torch.autograd.grad(output.square().sum(), ours.parameters())))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    assert not torch.equal(ours(images()), found[0][0])
    expected = plain(ours).eval()
    torch.testing.assert_close(ours.eval()(images()), expected(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "conv0",
        "down_blocks.0",
        "down_blocks.1.denselayer1",
        "transitions_down.0",
        "transitions_down.1.conv",
        "transitions_up.0",
        "bottleneck",
        "classifier",
    ],
)
def test_modules_with_hooks_are_called_and_get_no_feature_buffer(name: str) -> None:
    ours = network()
    expected = plain(ours)
    called: list[bool] = []

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        called.append(any(map(backward_reads, given)))

    ours.get_submodule(name).register_forward_pre_hook(hook)
    assert_same_step(ours, expected, images())
    assert called == [False]


def test_what_is_kept_is_a_fifth_at_most() -> None:
    """A tenth and less of the paper's network, whose layers are many more."""
    spec = NetworkSpec("", 8, (4, 5, 7, 5, 4), 24, 0, 0, num_classes=5, drop_rate=0.2)
    ours, expected = FCDenseNet(5, 8, *spec.paths, 24), PlainFCDenseNet(spec)
    x, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    kept = [
        saved_for_backward(model, lambda m=model: F.cross_entropy(m(x), labels), x)
        for model in (ours, expected)
    ]
    assert 5 * kept[0] < kept[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_graphs_and_files() -> None:
    ours = network().float()
    x = images().float()
    assert_same_gradients_in_a_graph(ours, x)
    ours.eval()
    with torch.no_grad():
        expected = ours(x)
    program = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    for made in (torch.jit.script(ours), torch.fx.symbolic_trace(ours)):
        torch.testing.assert_close(made(x), expected)
    assert torch.equal(densenet_fast.optimize_for_inference(ours)(x), expected)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_autocast_computes_in_bfloat16() -> None:
    ours = network().float()
    expected = plain(ours.double()).float()
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(images().float()) for model in (ours, expected)]
    exact = plain(ours).float()(images().float())
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    errors = [float((output - exact).detach().norm()) for output in outputs]
    assert errors[0] <= 2 * errors[1]
    outputs[0].float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_arguments_and_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="as many blocks as down_blocks, 2, got 1"):
        FCDenseNet(5, 4, (2, 2), 2, (2,))
    with pytest.raises(TypeError, match=r"down_blocks\[1\] must be an integer, got 2.5"):
        FCDenseNet(5, 4, (2, 2.5), 2, (2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop_rate must be between 0 and 1, got 2"):
        FCDenseNet(5, drop_rate=2)
    ours = network()
    before = copy.deepcopy(ours.state_dict())
    for shape, message in (
        ((2, 3, 8, 8), "FCDenseNet expects 2 input channels, got 3"),
        ((2, 2, 8, 3), "images too small for its pooling: 8×3, expected at least 4×4"),
        ((1, 2, 4, 4), "Expected more than 1 value per channel when training"),
        ((2, 2, 8), "expects a 4-D input"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"is torch\.float32, but conv0\.weight is"):
        ours(torch.zeros(2, 2, 8, 8))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({**before, "conv0.weight": torch.ones(1)})
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(("layers", "millions"), [(56, 1.375), (67, 3.461), (103, 9.319)])
def test_the_paper_s_networks(layers: int, millions: float) -> None:
    """Its tables say 1.5, 3.5 and 9.4 million; what its text and table 2 describe has these."""
    made = getattr(densenet_fast, f"fcdensenet{layers}")(11)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
    convolutions = [m for m in made.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == layers
    if layers == 103:  # table 2, where the 576 channels behind the third block up are a 578
        blocks = [*made.down_blocks, made.bottleneck, *made.up_blocks]
        ends = [block[f"denselayer{len(block)}"].norm1.num_features + 16 for block in blocks]
        assert ends == [112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]
