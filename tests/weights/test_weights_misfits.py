"""All that does not fit is named, in the file's names and the model's, and nothing is loaded."""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_networks import monai_network, torchvision_network
from torch import Tensor, nn
from weight_files import (
    assert_unchanged,
    efficient_files,
    first_files,
    ours,
    prefixed,
    saved,
    snapshot,
    trained,
)

from densenet_fast import load_weights
from densenet_fast.weights.comparison import Misfit
from densenet_fast.weights.load import WeightsError

State = dict[str, Any]

# The file's state dict, and the names of its tensors by torchvision's.
FILES: dict[str, Callable[[], State]] = {
    "torchvision": lambda: trained(torchvision_network).state_dict(),
    "compiled": lambda: prefixed("_orig_mod.", trained(ours).state_dict()),
    "MONAI": lambda: trained(monai_network).state_dict(),
    "MONAI in Lightning": lambda: prefixed("net.", trained(monai_network).state_dict()),
    "efficient": lambda: efficient_files(trained(ours).state_dict()),
    "first": lambda: first_files(trained(ours).state_dict()),
    "first, parallel": lambda: prefixed("module.", first_files(trained(ours).state_dict())),
}
MODELS: dict[str, Callable[[], nn.Module]] = {"densenet_fast": ours, "MONAI": monai_network}


def common(name: str) -> str:
    """torchvision's name, spelled out here once more."""
    name = re.sub(r"^(_orig_mod|net|module)\.", "", name)
    name = name.replace("class_layers.out.", "classifier.").replace(".layers.", ".")
    name = name.replace("norm_final", "norm5")
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)


def listed(message: str, title: str) -> list[str]:
    """The lines of one section of the message."""
    match = re.search(rf"^  {title} \((\d+)\):\n((?:    .*\n)*)", message, re.MULTILINE)
    if match is None:
        return []
    lines = [line.strip() for line in match[2].splitlines()]
    assert len(lines) == int(match[1])
    return lines


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


@settings(max_examples=25)
@given(
    data=st.data(),
    file=st.sampled_from(list(FILES)),
    kind=st.sampled_from(list(MODELS)),
)
def test_everything_in_the_way_is_named(data: st.DataObject, file: str, kind: str) -> None:
    state, model = FILES[file](), trained(MODELS[kind], seed=1)
    own = {common(name): name for name in model.state_dict()}
    # At least one key stays, so that layout and prefix can be seen, and one of 13 counters.
    keys = sorted(state)
    anchor = next(key for key in keys if "denselayer1" in key and "conv" in key)
    choices = st.sampled_from([key for key in keys if key != anchor])
    changed = data.draw(st.lists(choices, min_size=1, max_size=12, unique=True))
    how = [data.draw(st.sampled_from(["drop", "rename", "reshape", "add"])) for _ in changed]
    missing, unexpected, shapes = [], [], []
    for at, (key, change) in enumerate(zip(changed, how, strict=True)):
        value, mine = state[key], own[common(key)]
        if change in ("drop", "rename"):
            del state[key]
            missing.append(Misfit(key, mine, "", shape(value)))
        if change in ("rename", "add"):
            name = f"{key}_{at}"
            state[name] = torch.ones(at + 1, dtype=torch.float64)
            unexpected.append(Misfit(name, f"{mine}_{at}", f"[{at + 1}]", ""))
        if change == "reshape":
            state[key] = torch.zeros(*value.shape, at + 1, dtype=value.dtype)
            shapes.append(Misfit(key, mine, shape(state[key]), shape(value)))

    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder, "file.pth"), state)
        with pytest.raises(WeightsError) as caught:
            load_weights(model, path)
    assert_unchanged(model, before)
    error = caught.value
    assert sorted(error.missing, key=str) == sorted(missing, key=str)
    assert sorted(error.shapes, key=str) == sorted(shapes, key=str)
    assert error.types == ()
    assert sorted(error.unexpected, key=str) == sorted(unexpected, key=str)
    assert_message(str(error), error)

    patterns = [one.model_name for one in (*missing, *shapes)]
    patterns += [one.file_name for one in unexpected]
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder, "file.pth"), state)
        report = load_weights(model, path, ignore=patterns)
    assert len(report.ignored) == len(patterns)
    left = {one.model_name for one in (*missing, *shapes)}
    for name, value in model.state_dict().items():
        source = next((key for key in state if common(key) == common(name)), None)
        expected = before[1][name] if name in left or source is None else state[source]
        assert torch.equal(value, expected), name


def assert_message(message: str, error: WeightsError) -> None:
    """Every tensor has its line, with both names and shapes."""
    lines = listed(message, "missing in the file")
    assert len(lines) == len(error.missing)
    for line, one in zip(lines, error.missing, strict=True):
        assert line.startswith(f"{one.model_name} {one.expected}")
        assert one.file_name in line
    lines = listed(message, "unexpected in the file")
    assert len(lines) == len(error.unexpected)
    for line, one in zip(lines, error.unexpected, strict=True):
        assert line.startswith(f"{one.file_name} {one.found}")
        assert one.model_name in line
    lines = listed(message, "of another shape")
    assert len(lines) == len(error.shapes)
    for line, one in zip(lines, error.shapes, strict=True):
        assert all(text in line for text in (one.file_name, one.model_name))
        assert f"{one.found} in the file" in line
        assert one.expected in line.rpartition("in the file")[2]


def test_message(tmp_path: Path) -> None:
    state = prefixed("module.", trained(monai_network).state_dict())
    del state["module.features.norm5.bias"]
    state["module.class_layers.out.bias"] = torch.ones(7, dtype=torch.float64)
    state["module.features.denseblock1.denselayer3.layers.norm1.bias"] = torch.ones(3)
    path = saved(tmp_path / "file.pth", {"state_dict": state})
    with pytest.raises(WeightsError) as caught:
        load_weights(trained(ours), path)
    assert str(caught.value).splitlines() == [
        f"{path} does not fit EfficientDenseNet, which is unchanged",
        "  file: MONAI layout in entry 'state_dict' under module.; model: torchvision layout",
        "  missing in the file (1):",
        "    features.norm5.bias [40] (in the file: module.features.norm5.bias)",
        "  unexpected in the file (1):",
        "    module.features.denseblock1.denselayer3.layers.norm1.bias [3] "
        "(in the model: features.denseblock1.denselayer3.norm1.bias)",
        "  of another shape (1):",
        "    module.class_layers.out.bias [7] in the file, classifier.bias [5] in the model",
        "  ignore= takes patterns of names that may differ, as 'classifier.*'",
    ]
    again = pickle.loads(pickle.dumps(caught.value))  # as a process pool does
    assert str(again) == str(caught.value)
    assert again.missing == caught.value.missing


def test_files_of_other_networks(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = trained(ours)
    path = saved(tmp_path / "file.pth", other.state_dict())
    with pytest.raises(WeightsError, match="file: no DenseNet's names") as caught:
        load_weights(model, path)
    assert [one.file_name for one in caught.value.unexpected] == list(other.state_dict())
    assert [one.model_name for one in caught.value.missing] == list(model.state_dict())


def test_what_is_no_tensor(tmp_path: Path) -> None:
    state = {**trained(ours).state_dict(), "epoch": 3, "classifier.bias": [1.0]}
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(WeightsError) as caught:
        load_weights(trained(ours), path)
    assert caught.value.unexpected == (Misfit("epoch", "epoch", "(int, not a tensor)", ""),)
    (one,) = caught.value.types
    assert one == Misfit("classifier.bias", "classifier.bias", "(list, not a tensor)", "float64")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_hold_no_plain_values(tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    weight = state["classifier.weight"]
    for value in (weight.to_sparse(), torch.empty_like(weight, device="meta"), weight.cfloat()):
        path = saved(tmp_path / "file.pth", {**state, "classifier.weight": value})
        model = trained(ours, seed=1)
        before = snapshot(model)
        with pytest.raises(WeightsError) as caught:
            load_weights(model, path, cast=True)
        assert [one.file_name for one in caught.value.types] == ["classifier.weight"]
        assert_unchanged(model, before)


def test_two_keys_for_one_tensor(tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    state["features.denseblock1.denselayer1.norm.1.bias"] = torch.ones(8)
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(ValueError, match=r"norm1\.bias and .*norm\.1\.bias of the file both"):
        load_weights(trained(ours), path)
    state = {**prefixed("model.", trained(ours).state_dict()), "classifier.bias": torch.ones(3)}
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(ValueError, match=r"of the file both stand for classifier\.bias; prefix="):
        load_weights(trained(ours), path)
    report = load_weights(trained(ours), path, prefix="model")
    assert report.outside == ("classifier.bias",)

    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = trained(ours)
            self.classifier = nn.Linear(3, 2)

    path = saved(tmp_path / "file.pth", trained(ours).state_dict())
    with pytest.raises(ValueError, match=r"of the model both stand for.*part of the model"):
        load_weights(Composed(), path)
    load_weights(Composed().encoder, path)


def test_errors_of_the_models_own_hooks_change_nothing(tmp_path: Path) -> None:
    model = trained(monai_network)
    path = saved(tmp_path / "file.pth", trained(ours, seed=1).state_dict())

    def refuse(module: nn.Module, keys: Any) -> None:
        raise ArithmeticError("refused")

    model.register_load_state_dict_post_hook(refuse)
    before = snapshot(model)
    with pytest.raises(ArithmeticError, match="refused"):
        load_weights(model, path)
    assert_unchanged(model, before)
