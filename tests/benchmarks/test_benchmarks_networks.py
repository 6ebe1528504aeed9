"""The `networks` suite compares what can build a network, with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure, peers
from benchmarks.environment import describe
from benchmarks.networks import NETWORKS, OTHER_NETWORKS, NetworkSpec, densenet_bc
from benchmarks.prediction import memory_plan
from benchmarks.prediction.shapes import FORMATS
from benchmarks.suites import Options, networks, step, step_page

CPU = torch.device("cpu")
SMALL = replace(NETWORKS["densenet121"], batch_size=2, image_size=64, num_classes=7)


@pytest.mark.parametrize("name", ["monai", "timm"])
def test_other_libraries_compute_the_same_function(name: str) -> None:
    peer = peers.PEERS[name]
    pytest.importorskip(peer.requires)
    assert peer.installed
    state = peers.initial_state(SMALL, seed=3)
    images = torch.randn(SMALL.input_shape)
    outputs = []
    for other in (peers.PEERS["naive"], peer):
        model = peers.build(other, SMALL, state, device=CPU).eval()
        with torch.no_grad():
            outputs.append(model(images))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_networks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("monai")
    # Logits that disagree would not be timed.
    layers = (1, 2, 1) if OTHER_NETWORKS[name].segmentation else (2, 1)
    small = replace(OTHER_NETWORKS[name], block_config=layers, image_size=16, batch_size=2)
    monkeypatch.setitem(OTHER_NETWORKS, "small", small)
    arguments = ["--no-progress", "--device", "cpu", "--networks", "small", "--rounds", "1"]
    arguments += ["--peers", "naive,ours-bottleneck,ours-converted", "--output", str(tmp_path)]
    measured = name == "densenet121-3d"
    arguments += ["--parts", "memory,inference" if measured else "inference"]
    assert cli.main(["networks", *arguments]) == 0
    record = json.loads((tmp_path / "networks.json").read_text())
    assert [len(entry["seconds"]) for entry in record["inference"]] == [1, 1, 1]
    if measured:
        naive, ours, _ = (entry["saved_for_backward"] for entry in record["memory"])
        assert naive > ours
    with pytest.raises(SystemExit, match="2"):
        cli.main(["step", *arguments])
    assert "unknown network: 'small'" in capsys.readouterr().err


def test_peers_are_compared_where_they_can_build_the_network() -> None:
    settings = {"peers": list(peers.PEERS)}
    small = set(step_page.peers_of(settings, densenet_bc(22, 12, batch_size=2)))
    ours = {"ours-converted", "compiled-ours", "ours-optimized"}
    anywhere = {*ours, "compiled-naive", "onnxruntime", "openvino"}
    assert small == {*peers.BASIC_PEERS, *anywhere}
    assert step_page.peers_of(settings, NETWORKS["densenet121"]) == list(peers.PEERS)
    wide = step_page.peers_of(settings, NETWORKS["densenet161"])
    assert set(peers.PEERS) - set(wide) == {"timm", "resnet50", "resnet101"}


def test_an_engine_is_compared_in_inference_alone() -> None:
    settings = {"peers": ["naive", "onnxruntime"], "parts": ["time", "inference"]}
    (time, inference, memory) = (
        step_page.compared(settings, SMALL, part) for part in ("time", "inference", "memory")
    )
    assert (time, inference, memory) == (["naive"], ["naive", "onnxruntime"], [])
    assert "onnxruntime" not in networks.plan(Options(full=True))["settings"]["peers"]
    settings["parts_of"] = {SMALL.title: ["time"]}
    assert step_page.compared(settings, SMALL, "inference") == []


def test_logits_that_disagree_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images) * 1.0001

    wrong = replace(peers.PEERS["onnxruntime"], requires="torch", deploy=deploy)
    monkeypatch.setitem(peers.PEERS, "onnxruntime", wrong)
    monkeypatch.setitem(NETWORKS, "small", replace(SMALL, block_config=(1, 1)))
    arguments = ["step", "--no-progress", "--device", "cpu", "--networks", "small"]
    arguments += ["--peers", "naive,onnxruntime,ours-none", "--parts", "inference"]
    assert cli.main([*arguments, "--rounds", "1", "--output", str(tmp_path)]) == 1
    entries = json.loads((tmp_path / "step.json").read_text())["inference"]
    assert [len(entry["seconds"]) for entry in entries] == [1, 0, 1]
    assert "e-04 away from those of naive" in entries[1]["error"]


def test_full_form_has_all_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    record = networks.plan(Options(full=True))
    assert len(record["settings"]["networks"]) == len(NETWORKS) + len(OTHER_NETWORKS) == 13
    monkeypatch.setitem(peers.PEERS, "timm", replace(peers.PEERS["timm"], requires="no_such"))
    settings = networks.plan(Options())["settings"]
    assert "timm" not in settings["peers"]
    assert settings["not_installed"][-1:] == ["no_such"]
    assert not {"compiled-naive", "compiled-ours"} & set(settings["peers"])


def test_small_run_beside_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    arguments = ["networks", "--no-progress", "--device", "cpu", "--networks", "small"]
    arguments += ["--peers", "naive,ours-none,resnet50", "--parts", "time,inference"]
    assert cli.main([*arguments, "--rounds", "1", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "networks.json").read_text())
    assert [entry["peer"] for entry in record["time"]] == ["naive", "ours-none", "resnet50"]
    assert "ResNet-50" in (tmp_path / "networks.md").read_text()


def test_a_peer_that_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "timm", replace(peers.PEERS["timm"], requires="no_such"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["networks", "--peers", "naive,timm"])
    assert "timm: not installed here: `pip install no_such`" in capsys.readouterr().err


def test_a_network_without_room_is_reported_and_the_rest_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "small", SMALL)
    ours, naive = (
        memory_plan.peak(SMALL, FORMATS["float32"], name, None) for name in ("none", "naive")
    )
    monkeypatch.setattr(step, "available_bytes", lambda device: (ours + naive) // 2)
    arguments = ["step", "--no-progress", "--device", "cpu", "--networks", "small", "--rounds", "1"]
    arguments += ["--peers", "naive,ours-none", "--parts", "time", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    record = json.loads((tmp_path / "step.json").read_text())
    assert [len(entry["seconds"]) for entry in record["time"]] == [0, 1]
    text = (tmp_path / "step.md").read_text()
    assert "- naive: does not fit: a step needs" in text
    assert cli.main([*arguments, "--resume"]) == 1


def test_a_device_without_room_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(spec: NetworkSpec) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setitem(NETWORKS, "small", SMALL)
    monkeypatch.setitem(peers.PEERS, "resnet50", replace(peers.PEERS["resnet50"], build=build))
    arguments = ["networks", "--no-progress", "--device", "cpu", "--networks", "small"]
    arguments += ["--peers", "resnet50,ours-none", "--parts", "inference", "--rounds", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 1
    text = (tmp_path / "networks.md").read_text()
    assert "- resnet50: does not fit: CUDA out of memory." in text
    assert 'densenet_fast, checkpoint="none"' in text


def test_a_peer_that_fails_is_reported_and_the_rest_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, timed = 0, measure.timed

    def fails_once(call: Callable[[], object], device: torch.device) -> float:
        nonlocal count
        count += 1
        if count == 3:  # the first peer's second round
            raise RuntimeError("no more of that")
        return timed(call, device)

    def build(spec: NetworkSpec) -> nn.Module:
        raise ImportError("a library that is broken")

    monkeypatch.setitem(NETWORKS, "small", SMALL)
    monkeypatch.setitem(peers.PEERS, "resnet50", replace(peers.PEERS["resnet50"], build=build))
    monkeypatch.setattr(measure, "timed", fails_once)
    arguments = ["networks", "--no-progress", "--device", "cpu", "--networks", "small"]
    arguments += ["--peers", "naive,ours-none,resnet50", "--parts", "inference", "--rounds", "3"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "networks.json").read_text())
    assert [len(entry["seconds"]) for entry in record["inference"]] == [1, 3, 0]
    text = (tmp_path / "networks.md").read_text()
    assert "- naive: RuntimeError: no more of that" in text
    assert "- resnet50: ImportError: a library that is broken" in text


def test_what_is_not_compared_is_said() -> None:
    record = networks.plan(Options(networks=("densenet161",)))
    record.update(suite="networks", complete=True, command="", environment=describe(CPU))
    record["settings"]["peers"] = ["naive", "ours-none", "compiled-naive", "resnet50"]
    record["settings"]["compiled_networks"] = []
    text = networks.page(record).markdown()
    assert "Not compared, do not build this network: ResNet-50, channels_last." in text
    assert "Not compared, compiled for networks that are named only: torch.compile of" in text


def test_parameters_are_those_of_each_network() -> None:
    figures = dict.fromkeys(("peak_gradients_allocated", "peak_gradients_freed"), 2**20)
    figures |= dict.fromkeys(("saved_for_backward", "resident_after_forward"), 2**20)
    record = networks.plan(Options(networks=("densenet121",)))
    record.update(suite="networks", complete=True, command="", environment=describe(CPU))
    record["memory"] = [
        {"network": NETWORKS["densenet121"].title, "peer": peer, **figures, "parameters": 4 * count}
        for peer, count in (("naive", 7_980_000), ("resnet50", 25_560_000))
    ]
    lines = networks.page(record).markdown().splitlines()
    for label, count in (("naive, contiguous", "7.98"), ("ResNet-50", "25.56")):
        (row,) = (line for line in lines if line.startswith(f"| {label}"))
        assert row.split("|")[2].strip() == count


def test_bars_leave_out_what_was_not_measured() -> None:
    record = networks.plan(Options(networks=("densenet121",)))
    record["inference"] = [
        {"network": NETWORKS["densenet121"].title, "peer": peer, "seconds": seconds}
        for peer, seconds in (("naive", [2.0]), ("timm", []), ("ours-none", [1.0]))
    ]
    plot = networks.figure(record)
    assert plot is not None
    (axes,) = plot.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["naive", "ours-none"]
    assert [bar.get_width() for bar in axes.patches] == [2.0, 1.0]
