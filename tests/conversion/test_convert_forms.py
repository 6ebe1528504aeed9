"""`convert` finds DenseNets by what they compute, in all the forms that people write them in."""

from __future__ import annotations

import copy
import io
from typing import Any

import forms
import pytest
import torch
import torch.nn.functional as F
from comparison import Recorder, replica
from form_networks import FORMS, First, input_of, make
from library_networks import (
    TOLERANCE,
    assert_same_step,
    assert_same_training,
    images,
    plain_copy,
)
from torch import Tensor, nn

from densenet_fast import convert, fusion_report, optimize_for_inference, revert
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.modules import eligibility
from densenet_fast.operators.torch_internals import BatchNorm

NO_RELU = "it has no ReLU between its norm and its convolution"
ORDER = "its operations come in another order than norm, ReLU, convolution"
GROUPED = (
    "0: conv1 has kernel_size (1, 1), stride (1, 1), padding (0, 0), dilation (1, 1), groups 2, "
    "padding_mode zeros"
)
SEGMENTATION: tuple[tuple[str, ...], dict[str, str]]
SEGMENTATION = ("down", "transition", "middle", "behind"), {}
# What is found in each form: names of what is converted, and of what is left alone and why.
FOUND: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "functional": (("dense1", "trans1", "dense2"), {}),
    "newest first": (("dense1", "trans1", "dense2"), {}),
    "without bottleneck": (("dense1", "trans1", "dense2"), {}),
    "bottles": (("features.layers_0", "features.down_0", "features.layers_1"), {}),
    "wrapped": (("dense1.layer", "trans1", "dense2.layer"), {}),
    "wrapped, dropout": (("dense1.layer", "trans1", "dense2.layer"), {}),
    "sequentials": (("features.block0", "features.down0", "features.block1"), {}),
    "sequentials in 1-D": (("features.block0", "features.down0", "features.block1"), {}),
    "sequentials in 3-D": (("features.block0", "features.down0", "features.block1"), {}),
    "stages with transitions": (("stage1", "stage2"), {}),
    "stages without bottleneck": (("stage1", "stage2"), {}),
    "stages with maxima": (("stage1", "stage2"), {}),
    "newest first, maxima": (("stage1", "stage2"), {}),
    "newest first, linear": (("stage1", "stage2"), {}),
    "linear maximum": (("dense1", "dense2"), {"trans1": NO_RELU}),
    "units": (("0.stage1", "0.stage2"), {}),
    "lists": (("stages.0", "stages.1", "transitions.0"), {}),
    "lists, frugal": (("stages.0", "stages.1", "transitions.0"), {}),
    "maximum": (("dense1", "trans1", "dense2"), {}),
    "functional maximum": (("dense1", "trans1", "dense2"), {}),
    "biased": (("dense1", "trans1", "dense2"), {}),
    "biased transition": (("dense1", "trans1", "dense2"), {}),
    "dashed": (("stage1", "stage2"), {}),
    "lazy": (("block0", "down0", "block1"), {}),
    "same padding": (("dense1", "trans1", "dense2"), {}),
    "grouped": ((), {"1": GROUPED}),
    "two ways": ((), {"1.0": ORDER, "1.1": ORDER}),
    "all at once": ((), {"1.0": ORDER, "1.1": ORDER}),
    "decoder": ((), {"1": "it has a norm without a convolution behind it"}),
    "segmentation": SEGMENTATION,
    "segmentation, dropout": SEGMENTATION,
}
EXACT = [form for form in FORMS if not form.endswith("dropout")]
CONVERTED = [form for form in EXACT if FOUND[form][0]]


def with_reference(
    form: str, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network that is converted, one as it came, and an input."""
    network = make(form).to(dtype)
    reference = copy.deepcopy(network)
    convert(network)
    return network, reference, input_of(network).to(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_found(form: str) -> None:
    network = make(form)
    random, state = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    report = convert(network)
    converted, left = FOUND[form]
    assert [row.name for row in report if row.converted] == list(converted)
    assert {row.name: row.reason for row in report if not row.converted} == left
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert modes == [module.training for module in network.modules()]


# Every form in one mode, one of them in all.
MODES = [(form, CHECKPOINT_MODES[at % 3]) for at, form in enumerate(CONVERTED)]
MODES += [("newest first", mode) for mode in CHECKPOINT_MODES]


@pytest.mark.parametrize(("form", "checkpoint"), dict.fromkeys(MODES))
def test_a_step_is_the_same(form: str, checkpoint: Any) -> None:
    network = make(form)
    reference = plain_copy(network, "frugal")
    convert(network, checkpoint=checkpoint)
    assert_same_step(First(network), First(reference), input_of(network))
    plain = [row for row in fusion_report(network) if not row.fused]
    assert all("norm" in row.name or row.name.endswith("bn") for row in plain), plain


@pytest.mark.parametrize(
    "form", ["newest first", "newest first, linear", "bottles", "units", "sequentials in 1-D"]
)
def test_training_and_frozen_norms(form: str) -> None:
    network, reference, x = with_reference(form)
    assert_same_training(network, reference, x)  # and are in evaluation then
    for part in (network, reference):
        part.zero_grad()
    assert_same_step(network, reference, x)
    for part in (network, reference):
        part.zero_grad()
        for at, module in enumerate(part.train().modules()):
            if isinstance(module, BatchNorm) and at % 2:
                module.eval()
    assert_same_step(network, reference, x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("form", ["newest first", "sequentials", "units", "lists"])
def test_gradients_of_images_and_layouts_are_the_same(form: str, channels_last: bool) -> None:
    network, reference, x = with_reference(form, torch.float32)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    seen: list[list[tuple[int, ...]]] = [[], []]
    gradients = []
    for one, strides in zip((network, reference), seen, strict=True):
        for name in FOUND[form][0]:
            one.get_submodule(name).register_forward_hook(
                lambda module, args, output, kept=strides: kept.append(output.stride())
            )
        image = x.clone().requires_grad_()
        First(one)(image).square().sum().backward()
        gradients.append(image.grad)
    assert seen[0] == seen[1]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["newest first", "sequentials", "lists", "units"])
def test_everything_of_the_network_stays_the_same_object(form: str) -> None:
    network = make(form)

    def identities() -> list[Any]:
        parts = [*network.named_parameters(), *network.named_buffers(), *network.named_modules()]
        return [(key, id(part)) for key, part in parts]

    before, types = identities(), [type(module) for module in network.modules()]
    attributes = [set(module.__dict__) for module in network.modules()]
    convert(network)
    network(input_of(network))
    assert identities() == before
    assert all(isinstance(m, kind) for m, kind in zip(network.modules(), types, strict=True))
    assert [type(m).__name__ for m in network.modules() if "converted_from" in type(m).__dict__]
    revert(network)
    assert types == [type(module) for module in network.modules()]
    assert attributes == [set(module.__dict__) for module in network.modules()]


@pytest.mark.parametrize("form", ["newest first", "sequentials", "lists", "units"])
def test_copies_and_files(form: str) -> None:
    network = make(form).eval()
    x = input_of(network)
    expected = First(network)(x)
    convert(network, checkpoint="block")
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        torch.testing.assert_close(First(other)(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
        rows = fusion_report(other)
        assert [row.fused for row in rows] == [row.fused for row in fusion_report(network)]
        modes = [part.checkpoint for part in other.modules() if hasattr(part, "checkpoint")]
        assert set(modes) == {"block"}
        revert(other)
        assert not any("converted_from" in type(part).__dict__ for part in other.modules())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["newest first", "bottles", "units", "lists"])
def test_compiled_exported_and_traced(form: str) -> None:
    network, reference, x = with_reference(form)
    graph = torch.compile(First(network), backend="aot_eager", fullgraph=True)
    assert_same_step(graph, First(reference), x)
    network.eval()
    expected = First(network)(x)
    exported = torch.export.export(First(network), (x,))
    assert not any("densenet_fast" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(optimize_for_inference(network)(x), network(x))


def test_bfloat16_stays_as_close_as_it_was() -> None:
    network = make("newest first")
    expected = network(input_of(network))
    network.float()
    reference = copy.deepcopy(network)
    convert(network)
    x = input_of(network).float()
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(one(x).double() - expected).norm() for one in (network, reference)]
    assert errors[0] <= 1.5 * errors[1]


def test_replicas_of_data_parallel() -> None:
    network = make("newest first")
    reference = copy.deepcopy(network)
    convert(network)
    copied = replica(network)
    x = input_of(network)
    for name in FOUND["newest first"][0]:
        assert not isinstance(copied.get_submodule(name).chain(eligibility.expected(x)), str)
    for one in (copied, reference):
        one(x).square().sum().backward()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("layer", [forms.SharedReLU, forms.NewestFirst])
def test_layers_of_a_sequential_share_a_buffer(
    layer: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the Sequential is no chain, and behind a block with a hooked layer."""
    densenet = pytest.importorskip("torchvision.models.densenet")
    torch.manual_seed(0)
    network = nn.Sequential(
        densenet._DenseBlock(3, 6, 2, 4, 0.0),
        *forms.layers_of(layer, 2, 18),
        forms.FunctionalTransition(26, 8),
        *forms.layers_of(layer, 2, 8),
        nn.Tanh(),
    ).double()
    network[0].denselayer2.register_forward_hook(lambda module, args, output: None)
    reference = copy.deepcopy(network)
    assert convert(network).complete
    runs = Recorder(monkeypatch).runs
    assert_same_step(network, reference, images(0, (2, 6, 6, 6)))
    assert runs == [1, 3, 2]


@pytest.mark.parametrize("layer", [forms.SharedReLU, forms.NewestFirst])
def test_a_block_of_ones_own_in_a_library_s_network(layer: type[nn.Module]) -> None:
    densenet = pytest.importorskip("torchvision.models.densenet")
    torch.manual_seed(0)
    network = densenet.DenseNet(4, (2, 2), 12, num_classes=5)
    network.features.denseblock2 = nn.Sequential(*forms.layers_of(layer, 2, 10))
    network.double()
    reference = copy.deepcopy(network)
    assert convert(network).complete
    assert_same_step(network, reference, images(0, (2, 3, 32, 32)))
    plain = {row.name: row.reason for row in fusion_report(network) if not row.fused}
    reason = "the block before it returns its features in an order of its own"
    assert plain == ({"features.norm5": reason} if layer is forms.NewestFirst else {})
    images_of_one = images(1, (1, 3, 32, 32))
    network.eval()
    expected = network(images_of_one)
    torch.testing.assert_close(optimize_for_inference(network)(images_of_one), expected)


def test_only_new_features_are_returned() -> None:
    block = forms.OnlyNew(3, 6).double()
    reference = copy.deepcopy(block)
    assert convert(block).complete
    x = images(0, (2, 6, 5, 7)).requires_grad_()
    output, expected = block(x), reference(x)
    assert output.shape == (2, 12, 5, 7)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    output.mul_(2).sum().backward()  # what a block returns may be written to
    ours = [p.grad for p in block.parameters()]
    expected.mul_(2).sum().backward()
    torch.testing.assert_close(ours, [p.grad for p in reference.parameters()])


def test_a_library_s_network_under_other_names() -> None:
    """A renamed copy of torchvision's classes, or a network whose forward was exchanged."""
    densenet = pytest.importorskip("torchvision.models.densenet")

    class OurLayer(densenet._DenseLayer):
        pass

    class OurBlock(densenet._DenseBlock):
        pass

    network = densenet.DenseNet(8, (2, 3), 16, num_classes=5).double()
    for module in network.modules():
        if type(module) is densenet._DenseLayer:
            module.__class__ = OurLayer
        if type(module) is densenet._DenseBlock:
            module.__class__ = OurBlock
    network.last_linear = network.classifier
    del network.classifier

    def forward(x: Tensor) -> Tensor:
        x = F.relu(network.features(x), inplace=True)
        return network.last_linear(F.avg_pool2d(x, kernel_size=2, stride=1).flatten(1))

    reference = copy.deepcopy(network)
    network.forward = forward
    network.last_linear = nn.Linear(16 * 4, 5).double()
    report = convert(network)
    assert [row.name for row in report if row.converted and row.name] == [
        "features.denseblock1",
        "features.transition1",
        "features.denseblock2",
    ]
    x = images(0, (2, 3, 64, 64))
    actual = network.features(x)
    torch.testing.assert_close(actual, reference.features(x), rtol=TOLERANCE, atol=TOLERANCE)
    assert sum(row.fused for row in fusion_report(network)) >= 6


def test_a_bad_input_is_refused_before_anything_changes() -> None:
    network = nn.Sequential(*forms.layers_of(forms.NewestFirst, 2, 6))
    network.append(forms.FunctionalTransition(14, 7))
    convert(network)
    before = copy.deepcopy(network.state_dict())
    for shape, message in (
        ((2, 5, 8, 8), "expects 6 input channels, got 5"),
        ((2, 6, 1, 8), "too small for its pooling"),
        ((1, 6, 1, 1), "too small for its pooling"),
        ((2, 6, 8), "expects a 4-D input"),
    ):
        with pytest.raises(ValueError, match=message):
            network(torch.randn(shape))
    for image in (torch.randn(2, 6, 8, 8).double(), torch.ones(2, 6, 8, 8, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"input is torch\.float64|got torch\.int64"):
            network(image)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_what_is_default_around_does_not_matter() -> None:
    """Another device or type for new tensors, no gradients, and networks without any values."""
    for around in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu")):
        network = FORMS["units"]().double()
        reference = copy.deepcopy(network)
        with around:
            assert convert(network).complete
        assert_same_step(network, reference, input_of(network))
    assert convert(FORMS["units"]().to("meta")).complete


def test_a_class_with_names_of_ours_is_left_alone() -> None:
    class Runner(forms.ListBlock):
        checkpoint = True

    block = Runner(2, 6)
    [row] = convert(block)
    assert row.reason == (
        "it has an attribute 'checkpoint', which converted modules have: rename it"
    )
    assert type(block) is Runner


def test_modules_that_have_seen_no_input() -> None:
    network = nn.Sequential(nn.LazyConv2d(6, 1), forms.LazyBlock(3))
    [row] = convert(network)
    assert row.name == "1"
    assert row.reason == (
        "net.0.0 is a LazyBatchNorm2d without parameters yet: call the network once before"
    )
    x = torch.randn(2, 3, 4, 4)
    expected = network(x)
    assert convert(network).complete
    torch.testing.assert_close(network(x), expected)


def test_memory_kept_is_that_of_the_features() -> None:
    kept = []
    for converted in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(*forms.layers_of(forms.NewestFirst, 6, 6))
        if converted:
            convert(block)
        sizes: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in block.parameters()}

        def pack(t: Tensor, s: dict[int, int] = sizes, own: set[int] = own) -> Tensor:
            if t.data_ptr() not in own:
                s[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = block(torch.randn(4, 6, 32, 32))
        kept.append(sum(sizes.values()))
    # The features once, and parameters in the order of the features.
    assert output.nbytes < kept[1] < 1.3 * output.nbytes
    assert kept[1] < kept[0] / 8
