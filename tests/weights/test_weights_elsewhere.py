"""Files of other implementations: parts of names renamed, or tensors matched by their order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from library_networks import images
from torch import Tensor
from weight_files import assert_unchanged, first_files, ours, prefixed, saved, snapshot, trained

from densenet_fast import load_weights
from densenet_fast.weights.load import WeightsError

State = dict[str, Tensor]


def substituted(state: State, *pairs: tuple[str, str]) -> State:
    for pattern, replacement in pairs:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


def pretrainedmodels(state: State) -> State:
    return substituted(state, (r"^classifier\.", "last_linear."))


def chexnet(state: State) -> State:
    """Of a wrapper of torchvision's network with a sigmoid, before PyTorch 0.4, in parallel."""
    renamed = substituted(first_files(state), (r"^classifier\.", "classifier.0."))
    return prefixed("module.densenet121.", renamed)


def renumbered(state: State) -> State:
    """Other names throughout, numbers from 0, as no rule of parts gives them."""

    def name(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) - 1}.units.{int(match[2]) - 1}."

    return {
        re.sub(
            r"^classifier\.",
            "output.",
            re.sub(r"features\.denseblock(\d+)\.denselayer(\d+)\.", name, key),
        ): value
        for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("rewrite", "layout"), [(pretrainedmodels, "pretrainedmodels"), (chexnet, "CheXNet")]
)
def test_known_names(rewrite: Callable[[State], State], layout: str, tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    report = load_weights(model, saved(tmp_path / "file.pth", rewrite(source.state_dict())))
    assert_close(model(images()), source(images()), "output")
    assert report.layout in (layout, "torchvision's first files")
    assert report.matched == ()


def test_renamed_parts(tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    state = substituted(
        source.state_dict(),
        (r"^features\.", "backbone.body."),
        (r"\.denseblock(\d)\.", r".stage.b\1."),
        (r"^classifier\.", "fc."),
    )
    path = saved(tmp_path / "file.pth", state)
    blocks = {
        f"stage.b{i}": f"denseblock{i}" for i in (1, 2, 3, 4) if f"stage.b{i}" in str([*state])
    }
    rename = {"backbone": "features", "body": "", "fc": "classifier", **blocks}
    report = load_weights(model, path, rename=rename)
    assert_close(model(images()), source(images()), "output")
    assert report.loaded == tuple(model.state_dict())


@pytest.mark.parametrize(
    ("rename", "error", "words"),
    [
        ({"head": "classifier"}, ValueError, "no key has the part 'head'"),
        ({"norm1": "norm2"}, ValueError, "both become 'features"),
        ({"": "features"}, TypeError, "rename must be"),
        (["features"], TypeError, "rename must be"),
        ({"feature": "classifier"}, ValueError, "no key has the part 'feature'"),
    ],
)
def test_bad_renames(rename: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    model = trained(ours)
    path = saved(tmp_path / "file.pth", trained(ours, seed=1).state_dict())
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(words)):
        load_weights(model, path, rename=rename)
    assert_unchanged(model, before)


def test_tensors_matched_by_their_order(tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    state = renumbered(source.state_dict())
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(WeightsError):
        load_weights(model, path)
    report = load_weights(model, path, match="order")
    assert_close(model(images()), source(images()), "output")
    assert report.matched == tuple(zip(state, model.state_dict(), strict=True))
    assert "matched: output.bias -> classifier.bias" in str(report)


def test_order_with_what_is_ignored_and_without_counters(tmp_path: Path) -> None:
    source, model = trained(ours), trained(lambda: ours(num_classes=9), seed=1)
    state = renumbered(source.state_dict())
    state = {key: value for key, value in state.items() if not key.endswith("tracked")}
    path = saved(tmp_path / "file.pth", {"note": torch.ones(2), **state})
    kept = model.classifier.weight.clone()
    report = load_weights(model, path, match="order", ignore=("classifier.*", "output.*", "note"))
    assert torch.equal(model.classifier.weight, kept)
    assert len(report.ignored) == 5
    assert len(report.loaded) == len(state) - 2
    assert report.kept_counters
    model.classifier = source.classifier
    assert_close(model(images()), source(images()), "output")


@pytest.mark.parametrize("fault", ["shape", "kind", "missing", "unexpected", "no tensor"])
def test_order_that_does_not_fit(fault: str, tmp_path: Path) -> None:
    model = trained(ours)
    state = renumbered(trained(ours, seed=1).state_dict())
    name = next(key for key in state if key.endswith("conv2.weight"))
    place = [*state].index(name)
    if fault == "shape":
        state[name] = state[name][:1]
    elif fault == "no tensor":
        state[name] = "weights"
    elif fault == "kind":
        norm = name.replace("conv2", "norm1")
        state = {
            {norm: norm.replace("weight", "bias"), norm.replace("weight", "bias"): norm}.get(
                key, key
            ): value
            for key, value in state.items()
        }
        place = [*state].index(norm.replace("weight", "bias"))
    elif fault == "missing":
        name, place = "output.bias", len(state) - 1
        del state[name]
    else:
        state["output.scale"] = torch.ones(1)
        place = len(state) - 1
    before = snapshot(model)
    path = saved(tmp_path / "file.pth", state)
    with pytest.raises(
        WeightsError, match=f"the first {place} tensors do in this order, then"
    ) as caught:
        load_weights(model, path, match="order")
    [misfit] = caught.value.shapes
    assert (fault == "no tensor") == ("(str, not a tensor)" in str(misfit))
    assert_unchanged(model, before)


def test_what_matching_there_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", trained(ours).state_dict())
    with pytest.raises(ValueError, match="match must be one of 'name', 'order', got 'place'"):
        load_weights(trained(ours), path, match="place")  # type: ignore[arg-type]
