"""`convert` and `revert` against the other libraries' own networks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_networks import (
    LIBRARIES,
    NETWORKS,
    SHAPE,
    TOLERANCE,
    WHOLE,
    assert_same_step,
    images,
    make,
    plain_copy,
    timm_network,
    torchvision_network,
)
from torch import nn

from densenet_fast import EfficientDenseNet, convert, fusion_report, revert
from densenet_fast.memory import estimate
from densenet_fast.modules.layers import FusedBlock

models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize("checkpoint", ["none", "bottleneck", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_same(name: str, checkpoint: Any) -> None:
    model = make(name)
    reference = plain_copy(model)
    report = convert(model, checkpoint=checkpoint)
    assert report.complete, str(report)
    assert_same_step(model, reference, images())
    if name in WHOLE:
        assert fusion_report(model).all_fused, str(fusion_report(model))


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_the_same(name: str) -> None:
    model = make(name).eval()
    expected = model(images())
    convert(model)
    with torch.no_grad():
        output = model(images())
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_of_the_model_stays_the_same_object(name: str) -> None:
    model = make(name)
    model.get_submodule("features.denseblock2").eval()

    def identities() -> list[Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        parts = [*tensors, *model.named_modules()]
        modes = [module.training for module in model.modules()]
        return [[(key, id(part)) for key, part in parts], modes, list(model.state_dict())]

    before, types = identities(), [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    convert(model)
    assert identities() == before
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), types, strict=True))
    assert types != [type(module) for module in model.modules()]
    revert(model)
    assert identities() == before
    assert types == [type(module) for module in model.modules()]
    assert attributes == [set(module.__dict__) for module in model.modules()]


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_optimizer_made_before_goes_on(name: str) -> None:
    model = make(name)
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (model, reference)]
    convert(model)
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert_same_step(model, reference, images(step))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("part", ["denseblock1.denselayer2", "denseblock2", "transition1", ""])
def test_hooks_see_what_they_saw(name: str, part: str) -> None:
    model = make(name)
    reference = copy.deepcopy(model)
    seen: dict[str, list[torch.Tensor]] = {"model": [], "reference": []}
    for key, network in (("model", model), ("reference", reference)):
        path = f"features.{part}".rstrip(".")
        network.get_submodule(path).register_forward_hook(
            lambda module, args, output, key=key: seen[key].append(output)
        )
    convert(model)
    assert_same_step(model, reference, images())
    [ours], [theirs] = seen["model"], seen["reference"]
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_hook_may_change_a_layers_output(name: str) -> None:
    model = make(name)
    layer = model.get_submodule("features.denseblock1.denselayer1")
    layer.register_forward_hook(lambda module, args, output: output * 1.5)
    reference = copy.deepcopy(model)
    convert(model)
    assert_same_step(model, reference, images())
    report = fusion_report(model)
    row = report["features.denseblock1.denselayer1"]
    assert (row.fused, row.reason) == (False, "has a forward hook")
    assert report["features.denseblock1.denselayer2"].fused


@pytest.mark.parametrize("name", LIBRARIES)
def test_copies_and_files(name: str) -> None:
    model = make(name).eval()
    expected = model(images())
    convert(model, checkpoint="block")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other) is type(model)
        blocks = [m for m in other.modules() if isinstance(m, FusedBlock)]
        assert [block.checkpoint for block in blocks] == ["block", "block"]
        torch.testing.assert_close(other(images()), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", LIBRARIES)
def test_state_dicts_go_both_ways(name: str) -> None:
    model, other = make(name, 0), make(name, 7).eval()
    other(images())
    convert(model)
    model.load_state_dict(other.state_dict())
    model.eval()
    torch.testing.assert_close(model(images()), other(images()), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", LIBRARIES)
def test_graphs_are_the_librarys_own(name: str) -> None:
    model = make(name).eval()
    expected = model(images())
    convert(model)
    with pytest.warns(FutureWarning):
        traced = torch.jit.trace(model, images())
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("densenet_fast" in kind or "PythonOp" in kind for kind in kinds)
    torch.testing.assert_close(traced(images()), expected)
    exported = torch.export.export(model, (images(),))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not any("densenet_fast" in target for target in targets)
    torch.testing.assert_close(exported.module()(images()), expected)


def test_dropout_of_torchvision_and_timm_drops() -> None:
    for model in (torchvision_network(drop_rate=0.9), timm_network(proj_drop_rate=0.9)):
        convert(model)
        x = images().float()
        assert fusion_report(model).all_fused
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


# Networks inside others


def features_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    output = model(x)
    if isinstance(output, dict):
        output = list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else [output]


def encoder_of_smp() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.encoders.get_encoder("densenet121", weights=None)


def unet_of_smp() -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("densenet121", encoder_weights=None, classes=2)


def pyramid_of_torchvision() -> nn.Module:
    utils = pytest.importorskip("torchvision.models.detection.backbone_utils")
    layers = {"denseblock1": "0", "denseblock2": "1"}
    return utils.BackboneWithFPN(torchvision_network().features, layers, [32, 40], 8)


def pyramid_of_timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("densenet121", pretrained=False, features_only=True)


INSIDE = {
    "smp-encoder": encoder_of_smp,
    "smp-unet": unet_of_smp,
    "torchvision-fpn": pyramid_of_torchvision,
    "timm-features": pyramid_of_timm,
    "wrapped": lambda: nn.DataParallel(torchvision_network(), device_ids=[]),
}


@pytest.mark.parametrize("name", INSIDE)
def test_features_at_several_scales(name: str) -> None:
    torch.manual_seed(0)
    model = INSIDE[name]().double()
    reference = copy.deepcopy(model)
    report = convert(model)
    assert sum(row.converted for row in report) >= 3, str(report)
    x = images(shape=(2, 3, 64, 64))
    ours, theirs = features_of(model, x), features_of(reference, x)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    for outputs in (ours, theirs):
        sum(out.square().mean() for out in outputs[1:] or outputs).backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


def test_a_detector_with_our_backbone() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    backbone = torchvision_network().features
    backbone.out_channels = 40
    anchors = detection.rpn.AnchorGenerator(((32,),), ((1.0,),))
    model = detection.FasterRCNN(
        backbone, 2, min_size=64, max_size=64, rpn_anchor_generator=anchors
    ).double()
    model.roi_heads.box_roi_pool.featmap_names = ["0"]
    reference = copy.deepcopy(model)
    report = convert(model)
    assert [row.name for row in report] == [
        "backbone.denseblock1",
        "backbone.transition1",
        "backbone.denseblock2",
    ]
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]).double(), "labels": torch.tensor([1])}
    losses = []
    for network in (model, reference):
        torch.manual_seed(1)
        losses.append(network([images()[0]], [target]))
    for key, value in losses[1].items():
        torch.testing.assert_close(losses[0][key], value, rtol=1e-9, atol=1e-9)


# What is not converted, and why


def test_subclasses_are_named() -> None:
    model = torchvision_network()

    class Odd(type(model.features.transition1)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.features.transition1.__class__ = Odd
    model.double()
    reference = copy.deepcopy(model)
    report = convert(model)
    row = report["features.transition1"]
    assert row.reason == "it is a subclass of _Transition, which may do anything"
    assert report["features.denseblock2"].converted
    assert_same_step(model, reference, images())


def test_an_encoder_with_its_own_forward_says_so() -> None:
    report = convert(encoder_of_smp())
    assert report[""].reason is not None
    assert "subclass of DenseNet whose forward is its own" in report[""].reason
    assert report["features.denseblock1"].type == "torchvision _DenseBlock"
    assert sum(row.converted for row in report) == 7


def test_our_own_network_needs_no_conversion() -> None:
    model = EfficientDenseNet(8, (2, 2), 16, num_classes=5)
    [row] = convert(model)
    assert row.reason == "it is densenet_fast's own network"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_network_is_named() -> None:
    report = convert(torch.jit.trace(torchvision_network().eval(), images().float()))
    assert report[""].reason is not None
    assert "TorchScript" in report[""].reason


@pytest.mark.parametrize("function", [convert, revert])
def test_bad_models(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="expects a module, got str"):
        function("densenet121")
    with pytest.raises(ValueError, match=r"found no.* in ResNet"):
        function(models.resnet18())


def test_bad_checkpoint_changes_nothing() -> None:
    model = torchvision_network()
    for mode in ("auto", "blocks", None):
        with pytest.raises((ValueError, TypeError), match="checkpoint must be one of"):
            convert(model, checkpoint=mode)  # type: ignore[arg-type]
    assert type(model) is models.DenseNet
    assert type(model.features) is nn.Sequential


def test_converting_again_sets_the_mode() -> None:
    model = torchvision_network()
    convert(model)
    report = convert(model, checkpoint="block")
    assert report.complete
    assert len(report) == 4
    assert [m.checkpoint for m in model.features if hasattr(m, "checkpoint")] == ["block"] * 2
    assert "torchvision DenseNet " in str(report)


def test_report_is_a_table() -> None:
    report = convert(torchvision_network())
    first, model, *_ = str(report).splitlines()
    assert first == "4 of 4 parts converted"
    assert model.startswith("(the model)")
    assert [row.name for row in report][1:] == [
        "features.denseblock1",
        "features.transition1",
        "features.denseblock2",
    ]
    with pytest.raises(KeyError):
        report["features.denseblock9"]


def test_estimates_are_for_our_own_networks() -> None:
    model = torchvision_network()
    convert(model)
    with pytest.raises(TypeError, match="EfficientDenseNet"):
        estimate(model, SHAPE)  # type: ignore[arg-type]


def test_memory_kept_is_that_of_our_network() -> None:
    ours = EfficientDenseNet(8, (2, 3), 16, num_classes=5)
    converted = torchvision_network()
    convert(converted)
    kept = []
    for model in (ours, converted, torchvision_network()):
        sizes: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(t: torch.Tensor, s: dict[int, int] = sizes, own: set[int] = own) -> torch.Tensor:
            if t.data_ptr() not in own:
                s[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(images().float()).sum()
        kept.append(sum(sizes.values()))
        del loss
    assert kept[0] == kept[1] < kept[2] / 2
