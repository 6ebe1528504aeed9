"""`latency` has the cases it names, engines where they are installed, and the host's share."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import densenet_fast
from benchmarks import children, cli, engines, host, measure, peers
from benchmarks.networks import NetworkSpec
from benchmarks.suites import Options, latency

QUIET = ["latency", "--no-progress", "--device", "cpu", "--rounds", "2"]
COMPILED = pytest.mark.skipif(
    not densenet_fast.build_info()["cpu_isa"], reason="the operators are not compiled"
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> NetworkSpec:
    """One network with a layer in each of two blocks, for all parts."""
    spec = replace(latency.HOST, block_config=(1, 1), image_size=32)
    monkeypatch.setattr(latency, "SMALL", {"time": [spec], "inference": [spec]})
    monkeypatch.setattr(latency, "HOST", spec)
    return spec


def page_of(folder: Path, *arguments: str, status: int = 0) -> tuple[dict[str, Any], str]:
    """Record and page of a run."""
    assert cli.main([*QUIET, *arguments, "--output", str(folder)]) == status
    return json.loads((folder / "latency.json").read_text()), (folder / "latency.md").read_text()


def test_cases_and_peers_of_the_forms() -> None:
    settings = latency.plan(Options())["settings"]
    parts = {title.split(", ")[1]: parts for title, parts in settings["parts_of"].items()}
    assert parts == {
        "1×3×32×32": ["inference"],
        "1×3×64×64": ["time", "inference"],
        "2×3×64×64": ["time"],
        "1×3×224×224": ["inference"],
        "8×3×224×224": ["inference"],
    }
    wanted = {*settings["peers"], *settings["not_installed"]}
    assert wanted == {*latency.BASIC, *latency.ENGINES}
    assert "compiled-naive" in latency.plan(Options(full=True))["settings"]["peers"]
    for options in (Options(device=torch.device("cuda")), Options(amp="bfloat16")):
        assert latency.plan(options)["settings"]["peers"] == list(latency.BASIC)


def child(**arguments: Any) -> tuple[list[dict[str, Any]], float]:
    """What the host's child returns, and what an operator leaves there where a mean should be."""
    figures = host.child(**arguments)
    mean, var = torch.full((3,), 7.0), torch.zeros(3)
    torch.ops.densenet_fast.channel_statistics(torch.ones(1, 2, 2, 3), mean, var)
    return figures, float(mean.sum())


@COMPILED
def test_a_run_has_all_parts(
    tiny: NetworkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = []

    def watched(function: str, arguments: dict[str, Any], *, threads: int) -> Any:
        assert function == "benchmarks.host:child"
        figures, total = children.call_in_child(f"{__name__}:child", arguments, threads=threads)
        sums.append(total)
        return figures

    monkeypatch.setattr(host, "call_in_child", watched)
    record, text = page_of(tmp_path, "--peers", "naive,ours-none,ours-block")
    for part in ("time", "inference"):
        assert [entry["peer"] for entry in record[part]] == ["naive", "ours-none", "ours-block"]
        assert all(len(entry["seconds"]) == 2 for entry in record[part])
    assert sums == [21.0]  # no operator wrote anything
    none, block = record["host"]
    assert (none["peer"], block["peer"]) == ("ours-none", "ours-block")
    assert len(none["seconds"]) == 2
    assert block["calls"]["densenet_fast"] > none["calls"]["densenet_fast"] > 20
    assert block["calls"]["aten"] > 20
    host_row = next(line for line in text.splitlines() if " % " in line and "block" in line)
    assert f"{block['calls']['densenet_fast']}" in host_row
    assert (tmp_path / "latency.png").exists()


@pytest.mark.parametrize("name", latency.ENGINES)
def test_engines_run_the_same_network(name: str, tiny: NetworkSpec, tmp_path: Path) -> None:
    pytest.importorskip(name)
    arguments = ("--peers", f"ours-none,{name}", "--parts", "inference")
    record, text = page_of(tmp_path, *arguments)  # which compares their logits
    assert [len(entry["seconds"]) for entry in record["inference"]] == [2, 2]
    assert peers.PEERS[name].label in text


def test_engines_have_their_network_for_the_images_they_are_given(tiny: NetworkSpec) -> None:
    pytest.importorskip("onnxruntime")
    model = peers.build_torchvision(tiny, memory_efficient=False).eval()
    images = torch.randn(tiny.input_shape)
    run = engines.onnxruntime(model, images)
    with torch.no_grad():
        torch.testing.assert_close(run(2 * images), model(2 * images), rtol=1e-4, atol=1e-5)


def test_missing_engines_are_said(
    tiny: NetworkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in latency.ENGINES:
        peer = replace(peers.PEERS[name], requires=f"no_{name}")
        monkeypatch.setitem(peers.PEERS, name, peer)
    record, text = page_of(tmp_path, "--parts", "inference")
    assert record["settings"]["peers"] == list(latency.BASIC)
    assert "Not compared, as not installed: no_onnxruntime, no_openvino." in text


def test_a_host_that_cannot_be_measured_is_reported_and_resumed(
    tiny: NetworkSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*arguments: object) -> None:
        raise measure.MeasurementError("there is no compiler")

    arguments = ("--peers", "ours-none", "--parts", "host")
    with monkeypatch.context() as patch:
        patch.setattr(host, "measure", no_compiler)
        record, text = page_of(tmp_path, *arguments, status=1)
    assert latency.failures(record) == ["host: there is no compiler"]
    assert "- there is no compiler" in text
    entry = {"peer": "ours-none", "seconds": [1.0], "calls": {"densenet_fast": 1, "aten": 2}}
    monkeypatch.setattr(host, "measure", lambda *arguments: [entry])
    record, _ = page_of(tmp_path, *arguments, "--resume")
    assert record["host"] == [entry]


@COMPILED
def test_every_operator_has_a_kernel_that_does_nothing() -> None:
    register = re.compile(r'm\.impl\("(\w+)"')
    csrc = Path(__file__).parents[2] / "csrc"
    files = csrc / "dispatch.h", csrc / "cpu" / "dispatch.cpp"
    names = {name for file in files for name in register.findall(file.read_text())}
    assert set(register.findall(host.source())) == names - {"packed_weights"}
