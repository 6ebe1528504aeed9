"""Checkpoint files of every library's DenseNet, loaded into networks of every library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from library_networks import images, timm_network, torchvision_network
from torch import nn
from weight_files import (
    LIBRARIES,
    assert_unchanged,
    first_files,
    ours,
    prefixed,
    saved,
    snapshot,
    trained,
)

from densenet_fast import load_weights
from densenet_fast.weights.comparison import Conversion
from densenet_fast.weights.load import WeightsError

FEW = len(trained(ours).state_dict())  # tensors of a network


@pytest.mark.parametrize("into", LIBRARIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_into_every_library(library: str, into: str, tmp_path: Path) -> None:
    source, model = trained(LIBRARIES[library]), trained(LIBRARIES[into], seed=1)
    report = load_weights(model, saved(tmp_path / "file.pth", source.state_dict()))
    assert_close(model(images()), source(images()), "output")
    named = {"MONAI": "MONAI"}
    assert report.layout == named.get(library, "torchvision")
    assert report.model_layout == named.get(into, "torchvision")
    assert report.loaded == tuple(model.state_dict())
    assert len(report) == FEW
    assert (report.prefix, report.entry) == ("", None)
    assert not (report.converted or report.ignored or report.kept_counters or report.outside)
    counter = "features.norm5.num_batches_tracked"
    assert torch.equal(model.state_dict()[counter], source.state_dict()[counter])


@pytest.mark.parametrize("into", LIBRARIES)
def test_torchvisions_first_files(into: str, tmp_path: Path) -> None:
    source, model = trained(ours), trained(LIBRARIES[into], seed=1)
    path = tmp_path / "file.pth"
    saved(path, first_files(source.state_dict()), _use_new_zipfile_serialization=False)
    counters = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("tracked")}
    report = load_weights(model, path)
    assert_close(model(images()), source(images()), "output")
    assert report.layout == "torchvision's first files"
    assert report.kept_counters == tuple(counters)
    assert len(report) == FEW - len(counters)
    assert all(torch.equal(model.state_dict()[name], counters[name]) for name in counters)
    assert f"kept: {len(counters)} num_batches_tracked" in str(report)


@pytest.mark.parametrize("library", LIBRARIES)
def test_round_trip(library: str, tmp_path: Path) -> None:
    """Through the other library's file back into the first one: bitwise the same."""
    first, second, third = (trained(LIBRARIES[library], seed) for seed in (0, 1, 2))
    between = trained(ours, seed=3)
    load_weights(between, saved(tmp_path / "1.pth", first.state_dict()))
    load_weights(second, saved(tmp_path / "2.pth", between.state_dict()))
    load_weights(third, saved(tmp_path / "3.pth", second.state_dict()))
    found = third.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(found[key], value), key


class Lightning(nn.Module):
    """As a LightningModule keeps its network beside a loss and metrics."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, network)


WRAPPED = ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model.net."]
WRAPPED += ["_orig_mod.module.", "model._orig_mod.", "trunk.", "module.encoder."]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("library", ["densenet_fast", "MONAI"])
def test_prefixes_of_files(prefix: str, library: str, tmp_path: Path) -> None:
    source, model = trained(LIBRARIES[library]), trained(ours, seed=1)
    path = saved(tmp_path / "file.pth", prefixed(prefix, source.state_dict()))
    report = load_weights(model, path)
    assert_close(model(images()), source(images()), "output")
    assert report.prefix == prefix


@pytest.mark.parametrize("name", ["module", "model", "net", "trunk"])
def test_models_with_prefixes(name: str, tmp_path: Path) -> None:
    source, model = trained(ours), trained(LIBRARIES["MONAI"], seed=1)
    wrapped = Lightning(model, name)
    report = load_weights(wrapped, saved(tmp_path / "file.pth", source.state_dict()))
    assert_close(model(images()), source(images()), "output")
    assert report.loaded[0] == f"{name}.features.conv0.weight"
    again = Lightning(trained(ours, seed=2), "net")
    path = saved(tmp_path / "wrapped.pth", wrapped.state_dict())
    assert load_weights(again, path).prefix == f"{name}."
    assert_close(again.net(images()), source(images()), "output")


def test_compiled_networks_and_parts_of_them(tmp_path: Path) -> None:
    source = trained(ours)
    compiled = torch.compile(trained(ours, seed=1))
    load_weights(compiled, saved(tmp_path / "file.pth", source.state_dict()))
    part = trained(ours, seed=2)
    part.features = torch.compile(part.features)
    path = saved(tmp_path / "part.pth", part.state_dict())
    assert "features._orig_mod.conv0.weight" in part.state_dict()
    assert torch.equal(
        compiled.state_dict()["_orig_mod.classifier.bias"], source.state_dict()["classifier.bias"]
    )
    load_weights(source, path)
    assert torch.equal(source.features.conv0.weight, part.features.conv0.weight)


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "model_ema", "any"])
def test_entries_of_training_checkpoints(entry: str, tmp_path: Path) -> None:
    import argparse

    source, model = trained(ours), trained(ours, seed=1)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    content = {
        "epoch": 3,
        entry: source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(batch_size=8),
        "best": torch.tensor(0.5),
    }
    report = load_weights(model, saved(tmp_path / "file.pth", content))
    assert report.entry == entry
    assert f"entry {entry!r}" in str(report)
    assert_close(model(images()), source(images()), "output")


def test_one_of_several_state_dicts(tmp_path: Path) -> None:
    live, ema, model = trained(ours), trained(ours, seed=1), trained(ours, seed=2)
    content = {"model": live.state_dict(), "model_ema": ema.state_dict(), "epoch": 1}
    path = saved(tmp_path / "file.pth", content)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"several state dicts.*'model', 'model_ema'"):
        load_weights(model, path)
    assert_unchanged(model, before)
    for entry, source in (("model_ema", ema), ("model", live)):
        assert load_weights(model, path, entry=entry).entry == entry
        assert_close(model(images()), source(images()), "output")
    with pytest.raises(ValueError, match=r"no entry 'ema'.*'model_ema'"):
        load_weights(model, path, entry="ema")
    with pytest.raises(ValueError, match="entry 'epoch' is a int, expected a state dict"):
        load_weights(model, path, entry="epoch")


def test_one_of_several_networks(tmp_path: Path) -> None:
    student, teacher, model = (trained(ours, seed) for seed in range(3))
    state = {
        **prefixed("student.", student.state_dict()),
        **prefixed("teacher.", teacher.state_dict()),
    }
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(WeightsError, match=r"several networks: prefix=.*'student\.', 'teacher\.'"):
        load_weights(model, path)
    for prefix in ("teacher", "teacher."):
        report = load_weights(model, path, prefix=prefix)
        assert report.prefix == "teacher."
        assert report.outside == tuple(prefixed("student.", student.state_dict()))
        assert_close(model(images()), teacher(images()), "output")
    with pytest.raises(ValueError, match=r"begins with prefix='techer.*'student\.', 'teacher\.'"):
        load_weights(model, path, prefix="techer")


def test_block_alone(tmp_path: Path) -> None:
    source, model = trained(LIBRARIES["MONAI"]), trained(ours, seed=1)
    path = saved(tmp_path / "file.pth", source.state_dict())
    report = load_weights(model.features.denseblock2, path, prefix="features.denseblock2")
    assert report.layout == "MONAI"
    expected = source.features.denseblock2.denselayer3.layers.conv2.weight
    assert torch.equal(model.features.denseblock2.denselayer3.conv2.weight, expected)


def test_same_prefix_of_more_than_a_network(tmp_path: Path) -> None:
    """A U-Net's own file is loaded as it is, a file of its encoder into the encoder alone."""

    def unet(seed: int) -> nn.Module:
        network = Lightning(trained(ours, seed), "encoder")
        network.decoder = nn.Conv2d(4, 2, 1).double()
        return network

    first, second = unet(0), unet(1)
    path = saved(tmp_path / "unet.pth", prefixed("module.", first.state_dict()))
    report = load_weights(second, path)
    assert report.prefix == "module."
    assert len(report) == FEW + 2
    assert torch.equal(second.decoder.weight, first.decoder.weight)
    encoder = saved(tmp_path / "encoder.pth", trained(ours, seed=2).state_dict())
    with pytest.raises(WeightsError) as caught:
        load_weights(second, encoder)
    assert [one.model_name for one in caught.value.missing] == ["decoder.weight", "decoder.bias"]
    report = load_weights(second, encoder, ignore="decoder.*")
    assert len(report.ignored) == 2
    assert torch.equal(second.decoder.weight, first.decoder.weight)
    assert_close(second.encoder(images()), trained(ours, seed=2)(images()), "output")


@pytest.mark.parametrize("library", ["torchvision", "MONAI"])
@pytest.mark.parametrize("pattern", ["classifier.*", "own", ("*classifier.*",)])
def test_other_number_of_classes(library: str, pattern: Any, tmp_path: Path) -> None:
    source, model = trained(LIBRARIES[library]), trained(lambda: ours(num_classes=9), seed=1)
    path = saved(tmp_path / "file.pth", source.state_dict())
    bias = model.classifier.bias.detach().clone()
    if pattern == "own":  # the file's
        pattern = "class_layers.*" if library == "MONAI" else "classifier.???*"
    report = load_weights(model, path, ignore=pattern)
    assert torch.equal(model.classifier.bias, bias)
    features = source.features(images())
    assert_close(model.features(images()), features, "features")
    assert len(report) == FEW - 2
    assert report.ignored == (
        "classifier.weight [9, 40], [5, 40] in the file",
        "classifier.bias [9], [5] in the file",
    )
    assert "ignored: classifier.bias [9], [5] in the file" in str(report)


def test_what_fits_is_loaded_although_it_may_be_ignored(tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    path = saved(tmp_path / "file.pth", source.state_dict())
    report = load_weights(model, path, ignore=["classifier.*", "features.*"])
    assert (len(report), report.ignored) == (FEW, ())
    assert_close(model(images()), source(images()), "output")


def test_nothing_is_left_to_load(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", nn.Linear(3, 4).state_dict())
    with pytest.raises(WeightsError, match="no tensor of the file can be loaded"):
        load_weights(trained(ours), path, ignore="*")


def test_averaged_models(tmp_path: Path) -> None:
    """torch's averages of weights count their updates beside the network."""
    source, model = trained(ours), trained(ours, seed=1)
    averaged = torch.optim.swa_utils.AveragedModel(source)
    path = saved(tmp_path / "file.pth", averaged.state_dict())
    with pytest.raises(WeightsError, match=r"unexpected in the file \(1\):\n    n_averaged \[\]"):
        load_weights(model, path)
    report = load_weights(model, path, ignore="n_averaged")
    assert report.prefix == "module."
    assert_close(model(images()), source(images()), "output")
    load_weights(torch.optim.swa_utils.AveragedModel(model), path)


def test_encoders_of_segmentation_models(tmp_path: Path) -> None:
    library = pytest.importorskip("segmentation_models_pytorch")
    torchvision = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    source = torchvision.densenet121()
    path = saved(tmp_path / "file.pth", first_files(source.state_dict()))
    unet = library.Unet("densenet121", encoder_weights=None, classes=2)
    decoder = unet.decoder.state_dict()
    before = {key: value.clone() for key, value in decoder.items()}
    report = load_weights(unet, path, ignore=("decoder.*", "segmentation_head.*", "*classifier.*"))
    wanted = source.features.state_dict()
    for key, value in unet.encoder.features.state_dict().items():
        if not key.endswith("tracked"):
            assert torch.equal(value, wanted[key]), key
    assert all(torch.equal(value, before[key]) for key, value in decoder.items())
    assert all(name.startswith("encoder.features.") for name in report.loaded)
    kept = len(unet.state_dict()) - len(report)
    missing = [text for text in report.ignored if text.endswith("missing in the file")]
    assert len(missing) + len(report.kept_counters) == kept


def test_networks_without_classifier(tmp_path: Path) -> None:
    bare = trained(lambda: timm_network(num_classes=0), seed=1)
    path = saved(tmp_path / "file.pth", trained(LIBRARIES["MONAI"]).state_dict())
    with pytest.raises(WeightsError) as caught:
        load_weights(bare, path)
    assert [one.file_name for one in caught.value.unexpected] == [
        "class_layers.out.weight",
        "class_layers.out.bias",
    ]
    for pattern in ("classifier.*", "class_layers.*"):
        report = load_weights(bare, path, ignore=pattern)
        assert report.ignored[0] == "class_layers.out.weight [5, 40], not in the model"


def test_timms_deep_stem(tmp_path: Path) -> None:
    deep = trained(lambda: timm_network(stem_type="deep"))
    path = saved(tmp_path / "file.pth", deep.state_dict())
    load_weights(trained(lambda: timm_network(stem_type="deep"), seed=1), path)
    with pytest.raises(WeightsError) as caught:
        load_weights(trained(ours), path)
    assert {one.file_name.split(".")[1] for one in caught.value.unexpected} == {
        "conv1",
        "norm1",
        "conv2",
        "norm2",
    }
    assert {one.file_name for one in caught.value.shapes} == {
        f"features.{name}" for name in ("conv0.weight", *(f"norm0.{n}" for n in ("weight", "bias")))
    } | {"features.norm0.running_mean", "features.norm0.running_var"}


def test_exact_conversions_are_reported(tmp_path: Path) -> None:
    source = trained(ours).float()
    model = trained(torchvision_network, seed=1)
    path = saved(tmp_path / "file.pth", source.state_dict())
    report = load_weights(model, path)
    assert model.classifier.weight.dtype == torch.float64
    assert torch.equal(model.classifier.weight, source.classifier.weight.double())
    floating = [k for k, v in model.state_dict().items() if v.is_floating_point()]
    assert report.converted == tuple(
        Conversion(name, torch.float32, torch.float64) for name in floating
    )
    line = f"converted: {len(floating)} from torch.float32 to torch.float64"
    assert line in str(report).splitlines()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_conversions_that_lose_precision_must_be_permitted(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = saved(tmp_path / "file.pth", trained(ours).state_dict())
    model = trained(ours, seed=1).to(dtype)
    before = snapshot(model)
    with pytest.raises(WeightsError, match="cast=True permits") as caught:
        load_weights(model, path)
    assert_unchanged(model, before)
    wanted = str(dtype).removeprefix("torch.")
    assert {(one.found, one.expected) for one in caught.value.types} == {("float64", wanted)}
    report = load_weights(model, path, cast=True)
    assert len(report.converted) == len(caught.value.types)
    assert model.classifier.bias.dtype == dtype


def test_values_beyond_the_range_are_never_cast(tmp_path: Path) -> None:
    source = trained(ours).float()
    with torch.no_grad():
        source.classifier.bias[2] = 1e6
    path = saved(tmp_path / "file.pth", source.state_dict())
    with pytest.raises(WeightsError) as caught:
        load_weights(trained(ours, seed=1).half(), path, cast=True)
    (one,) = caught.value.types
    assert (one.file_name, one.found) == (
        "classifier.bias",
        "float32 with values beyond its range",
    )


def test_counters_of_other_widths(tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    counter = "features.norm5.num_batches_tracked"
    model = trained(ours, seed=1)
    for dtype, fits in ((torch.int32, True), (torch.float32, False), (torch.bool, False)):
        path = saved(tmp_path / "file.pth", {**state, counter: torch.tensor(7).to(dtype)})
        if fits:
            assert load_weights(model, path).converted == (
                Conversion(counter, torch.int32, torch.int64),
            )
            assert model.state_dict()[counter].item() == 7
        else:
            with pytest.raises(WeightsError, match=r"another type \(1\)"):
                load_weights(model, path, cast=True)
