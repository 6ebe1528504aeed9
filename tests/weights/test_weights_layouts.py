"""Names of every library, and norms that a file has under another one."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from library_networks import images, monai_network, xrv_network
from torch import nn
from weight_files import (
    LIBRARIES,
    assert_unchanged,
    efficient_files,
    ours,
    prefixed,
    saved,
    snapshot,
    trained,
)

from densenet_fast import load_weights
from densenet_fast.weights.key_layouts import EFFICIENT, FIRST_FILES, MONAI, TORCHVISION
from densenet_fast.weights.load import WeightsError

LAYOUTS = [TORCHVISION, MONAI, FIRST_FILES, EFFICIENT]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one.name)
def test_layouts_translate_both_ways(layout: Any) -> None:
    names = [name for name in ours().state_dict() if not name.endswith("tracked")]
    translated = [layout.to_own(name) for name in names]
    assert [layout.to_common(name) for name in translated] == names
    assert [layout.to_common(name) for name in names] == names
    if layout is MONAI:
        assert translated == [n for n in monai_network().state_dict() if not n.endswith("tracked")]


class Efficient(nn.Module):
    """Named as efficient_densenet_pytorch names its network."""

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__()
        network = trained(lambda: ours(**kwargs), seed)
        parts = network.features._modules.items()
        names = {"norm5": "norm_final"}
        self.features = nn.Sequential(OrderedDict((names.get(n, n), part) for n, part in parts))
        self.classifier = network.classifier


@pytest.mark.parametrize("prefix", ["", "module.", "encoder."])
@pytest.mark.parametrize("into", LIBRARIES)
def test_files_of_efficient_densenet_pytorch(into: str, prefix: str, tmp_path: Path) -> None:
    source, model = trained(ours), trained(LIBRARIES[into], seed=1)
    state = efficient_files(source.state_dict())
    assert list(state) == list(Efficient().state_dict())
    report = load_weights(model, saved(tmp_path / "file.pth", prefixed(prefix, state)))
    assert_close(model(images()), source(images()), "output")
    assert (report.layout, report.prefix) == ("efficient_densenet_pytorch", prefix)
    assert report.loaded == tuple(model.state_dict())


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_of_efficient_densenet_pytorch(library: str, tmp_path: Path) -> None:
    source, model = trained(LIBRARIES[library]), Efficient(seed=1)
    report = load_weights(model, saved(tmp_path / "file.pth", source.state_dict()))
    assert report.model_layout == "efficient_densenet_pytorch"
    expected, norm = source.features.norm5.state_dict(), model.features.norm_final
    assert all(torch.equal(value, expected[key]) for key, value in norm.state_dict().items())


def test_small_inputs_of_efficient_densenet_pytorch(tmp_path: Path) -> None:
    source, model = Efficient(small_inputs=True), trained(lambda: ours(small_inputs=True), seed=1)
    report = load_weights(model, saved(tmp_path / "file.pth", source.state_dict()))
    assert report.layout == "efficient_densenet_pytorch"
    pairs = zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


PATTERNS = ["*", "features.norm*", ("features.norm5.*", "features.norm_last.*")]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("pattern", [(), *PATTERNS])
def test_renamed_norms_are_not_ignored(pattern: Any, prefix: str, tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    renamed = {key.replace("norm5", "norm_last"): value for key, value in state.items()}
    path = saved(tmp_path / "file.pth", prefixed(prefix, renamed))
    model = trained(ours, seed=1)
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, ignore=pattern)
    assert_unchanged(model, before)
    names = [name for name in state if "norm5" in name]
    assert [one.model_name for one in caught.value.missing] == names
    theirs = [prefix + name.replace("norm5", "norm_last") for name in names]
    assert [one.file_name for one in caught.value.unexpected] == theirs
    line = "  features.norm_last in the file may be features.norm5: ignore= does not leave out"
    assert line in str(caught.value)


def test_norms_of_other_widths_and_places_are_ignored(tmp_path: Path) -> None:
    model = trained(ours, seed=1)
    kept = {key: value.clone() for key, value in model.features.norm5.state_dict().items()}
    for name, channels in (("features.norm_last", 7), ("neck.norm5", 20), ("norm5", 20)):
        state = {k: v for k, v in trained(ours).state_dict().items() if "norm5" not in k}
        state |= prefixed(f"{name}.", nn.BatchNorm2d(channels).state_dict())
        path = saved(tmp_path / "file.pth", state)
        report = load_weights(model, path, ignore=("features.norm5.*", f"{name}.*"))
        assert len(report.ignored) == 10
        assert torch.equal(model.features.norm5.running_mean, kept["running_mean"])


def test_torchxrayvisions_thresholds(tmp_path: Path) -> None:
    """They belong to the outputs: loaded where they fit, and nothing is in their way."""
    source = trained(lambda: xrv_network(op_threshs=torch.rand(5)))
    path = saved(tmp_path / "file.pth", source.state_dict())
    same = trained(lambda: xrv_network(op_threshs=torch.rand(5)), seed=1)
    assert load_weights(same, path).ignored == ()
    assert torch.equal(same.op_threshs, source.op_threshs)
    for make in (ours, xrv_network):
        model = trained(make, seed=1)
        for file in (path, saved(tmp_path / "network.pth", source)):
            report = load_weights(model, file)
            assert report.ignored == ("op_threshs [5], not in the model",)
            assert torch.equal(model.classifier.weight, source.classifier.weight)
    assert "ignored: op_threshs [5], not in the model" in str(report)
    bare = saved(tmp_path / "bare.pth", trained(ours, seed=2).state_dict())
    assert load_weights(same, bare).ignored == ("op_threshs [5], missing in the file",)
    assert torch.equal(same.op_threshs, source.op_threshs)
    wider = trained(lambda: xrv_network(num_classes=9, op_threshs=torch.rand(9)))
    report = load_weights(wider, path, ignore="classifier.*")
    assert "op_threshs [9], [5] in the file" in report.ignored
