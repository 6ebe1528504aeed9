"""`step`, and the suites that measure other networks in its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, repeat
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from made_up import CPU, MIB, cells, figures, page, planned
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, memory, peers
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, OTHER_NETWORKS, NetworkSpec, densenet_bc
from benchmarks.suites import Options, depth, gate, growth, latency, load, networks, step, sweep


def seconds(record: dict[str, Any], part: str) -> list[int]:
    """Rounds of each row."""
    return [len(row[part]["seconds"]) for row in record["rows"] if part in row["parts"]]


# ---- One step


def test_small_run(run: Any, small: NetworkSpec) -> None:
    chosen = ["--networks", "small", "--peers", "naive,ours-none,ours-block"]
    record, text = run("step", *chosen, "--rounds", "2", "--parts", "time,inference")
    assert seconds(record, "time") == seconds(record, "inference") == [2] * 3
    head = next(line for line in text.splitlines() if line.startswith("| impl"))
    assert head.split("|")[2].strip() == "step, s"  # no memory
    assert "of 4 comparisons" in text or "in all 4 comparisons" in text


@pytest.mark.parametrize("amp", memory.AMP)
def test_under_autocast(
    amp: str, run: Any, small: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(*_: Any) -> None:
        on = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if on else None)

    def build(spec: NetworkSpec) -> nn.Module:
        model = peers.build_torchvision(spec, memory_efficient=False)
        model.classifier.register_forward_hook(note)
        return model

    monkeypatch.setitem(peers.PEERS, "naive", replace(peers.PEERS["naive"], build=build))
    chosen = ["--networks", "small", "--peers", "naive", "--amp", amp]
    run("step", *chosen, "--parts", "time,inference", "--rounds", "1")
    assert seen == [None if amp == "none" else getattr(torch, amp)] * 4


def test_a_case_that_does_not_fit_is_reported_and_not_timed(
    run: Any, small: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"naive": {"error": "does not fit: killed"}}
    measured |= {"ours-none": figures(8 * MIB), "ours-block": figures(2**60)}
    monkeypatch.setattr(step, "figures_in_child", lambda case: measured[case.peer])
    chosen = ["--networks", "small", "--peers", "naive,ours-none,ours-block", "--rounds", "1"]
    record, text = run("step", *chosen, "--parts", "memory,time", status=1)
    assert seconds(record, "time") == [0, 1, 0]
    assert "- memory of Small (k=32), 2×3×64×64, naive: does not fit: killed" in text
    assert "- time of Small (k=32), 2×3×64×64, naive: does not fit: nor did it" in text
    assert "ours-block: does not fit: a step needs 1,099,511,627,776 MiB" in text
    assert cells(text, "| densenet_fast")[0][2] == "8"
    run("step", *chosen, "--parts", "memory,time", "--resume", status=1)


def test_a_peer_that_fails_is_reported_and_the_rest_is_timed(
    run: Any, small: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first peer's second round, and another's network.
    third = chain([DEFAULT] * 2, [RuntimeError("no more of that")], repeat(DEFAULT))
    build = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    broken = replace(peers.PEERS["resnet50"], build=build, applies=lambda spec: True)
    monkeypatch.setitem(peers.PEERS, "resnet50", broken)
    monkeypatch.setattr(measure, "timed", Mock(wraps=measure.timed, side_effect=third))
    chosen = ["--networks", "small", "--peers", "naive,ours-none,resnet50", "--rounds", "3"]
    record, text = run("networks", *chosen, "--parts", "inference", status=1)
    assert seconds(record, "inference") == [1, 3, 0]
    assert "naive: RuntimeError: no more of that" in text
    assert "resnet50: does not fit: CUDA out of memory." in text


def test_logits_that_disagree_are_not_timed(
    run: Any, small: NetworkSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda images: model(images) * 1.0001

    wrong = replace(peers.PEERS["onnxruntime"], requires="torch", deploy=deploy)
    monkeypatch.setitem(peers.PEERS, "onnxruntime", wrong)
    chosen = ["--networks", "small", "--peers", "naive,onnxruntime,ours-none", "--rounds", "1"]
    record, _ = run("step", *chosen, "--parts", "inference", status=1)
    assert seconds(record, "inference") == [1, 0, 1]
    assert "e-04 away from those of naive" in record["rows"][1]["inference"]["error"]


# ---- Which peers


def rows_of(suite: str, **options: Any) -> list[tuple[str, str]]:
    rows = load(suite).plan(Options(**options))["rows"]
    return [(row["network"].split(" (")[0], row["peer"]) for row in rows]


def test_peers_are_compared_where_they_can_build_the_network() -> None:
    every = tuple(peers.PEERS)
    names = ("densenet-bc-100", "densenet121", "densenet161")
    rows = rows_of("networks", networks=names, peers=every)
    small, whole, wide = ([peer for n, peer in rows if n == NETWORKS[k].name] for k in names)
    anywhere = {"ours-converted", "compiled-ours", "ours-optimized", "compiled-naive"}
    assert set(small) == {*peers.BASIC_PEERS, *anywhere, "onnxruntime", "openvino"}
    assert whole == list(every)
    assert set(every) - set(wide) == {"timm", "resnet50", "resnet101"}


def test_forms_of_the_networks_suite() -> None:
    full, quick = rows_of("networks", full=True), rows_of("networks")
    assert len({name for name, _ in full}) == len(NETWORKS) + len(OTHER_NETWORKS) - 1  # two 3-D
    compiled = {network for network, peer in full if peer == "compiled-ours"}
    assert compiled == {NETWORKS[name].name for name in MAIN_NETWORKS}
    assert "compiled-naive" not in {peer for _, peer in quick}
    assert "onnxruntime" not in {peer for _, peer in full}
    named = rows_of("networks", networks=("densenet201",), peers=("naive", "compiled-naive"))
    assert ("DenseNet-201", "compiled-naive") in named


def test_a_peer_that_is_not_installed_is_left_out_or_refused(
    monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setitem(peers.PEERS, "timm", replace(peers.PEERS["timm"], requires="no_such"))
    record = planned("networks", networks=("densenet161",))
    assert "Not compared, as not installed: no_such." in page(record)
    said = refused("networks", "--peers", "naive,timm")
    assert "timm: not installed here: `pip install no_such`" in said


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_networks(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    # Logits that disagree would not be timed.
    layers = (1, 2, 1) if OTHER_NETWORKS[name].segmentation else (2, 1)
    small = replace(OTHER_NETWORKS[name], block_config=layers, image_size=16, batch_size=2)
    monkeypatch.setitem(OTHER_NETWORKS, "small", small)
    chosen = ["--networks", "small", "--peers", "naive,ours-bottleneck,ours-converted"]
    record, _ = run("networks", *chosen, "--rounds", "1", "--parts", "inference")
    assert seconds(record, "inference") == [1, 1, 1]


# ---- The gate


def test_the_gate_fails_for_memory_alone() -> None:
    def gated(ratio: float) -> dict[str, Any]:
        """A record of slow networks, the first with this ratio of memory."""
        record = planned("gate")
        for row in record["rows"]:
            ours = row["peer"].startswith("ours")
            if row["network"] == gate.SMALL_121.title:
                row["memory"] = figures(int(100 * MIB / ratio) if ours else 100 * MIB)
            row["time"] = row["inference"] = {"seconds": [2.0 if ours else 1.0]}
        return record

    good = gated(6)
    assert not gate.SUITE.failures(good)
    assert "not first in 18 of 27 comparisons" in page(good)
    first, second = gate.SUITE.failures(gated(4))
    assert "memory of DenseNet-121" in first and "at least 5.0× expected" in second
    good["rows"][0]["time"] = {"seconds": [], "error": "does not fit"}
    (failure,) = gate.SUITE.failures(good)
    assert failure.endswith("naive-channels-last: does not fit")
    assert f"- {failure}" in page(good)


def test_every_floor_belongs_to_something_that_is_measured() -> None:
    measured = {
        (row["network"], row["peer"])
        for row in gate.SUITE.plan(Options())["rows"]
        if "memory" in row["parts"]
    }
    floors = {(network, peer) for network, of in gate.FLOORS.items() for peer in of}
    naive = {(network, "naive-channels-last") for network in gate.FLOORS}
    assert measured == floors | naive


def test_gate_runs(run: Any, small: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "GATED", (small,))
    record, _ = run("gate", "--rounds", "1")
    assert all(row["parts"] == ["time", "inference"] for row in record["rows"])


# ---- Small work


@pytest.fixture
def tiny(small: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> NetworkSpec:
    spec = replace(small, image_size=32, batch_size=1)
    monkeypatch.setattr(latency, "SMALL", {part: [spec] for part in latency.SMALL})
    return spec


def test_cases_and_peers_of_small_work() -> None:
    rows = latency.SUITE.plan(Options())["rows"]
    parts = {r["network"].split(", ")[1]: r["parts"] for r in rows if r["peer"] == "ours-none"}
    assert parts == {
        "1×3×32×32": ["inference"],
        "1×3×64×64": ["time", "inference"],
        "2×3×64×64": ["time"],
        "1×3×224×224": ["inference"],
        "8×3×224×224": ["inference"],
    }
    assert "compiled-naive" in latency.SUITE.plan(Options(full=True))["settings"]["peers"]
    for options in (Options(device=torch.device("cuda")), Options(amp="bfloat16")):
        assert latency.SUITE.plan(options)["settings"]["peers"] == list(latency.BASIC)


@pytest.mark.parametrize("name", latency.ENGINES)
def test_engines_run_the_same_network(name: str, tiny: NetworkSpec, run: Any) -> None:
    pytest.importorskip(name)
    chosen = ("--peers", f"ours-none,{name}", "--rounds", "2")
    record, text = run("latency", *chosen)  # which compares their logits
    assert (seconds(record, "time"), seconds(record, "inference")) == ([2], [2, 2])
    assert peers.PEERS[name].label in text


# ---- Growth rates and depths


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("suite", "ends"), [(growth.SUITE, (8, 48)), (depth.SUITE, (40, 250))])
def test_sweeps_reach_from_end_to_end(
    suite: sweep.Sweep, ends: tuple[int, int], full: bool
) -> None:
    values = suite.values(Options(full=full))
    assert min(values) <= ends[0] and max(values) == ends[1]
    assert len(values) >= sweep.LEAST_POINTS  # how figures grow can be said
    named = Options(growth_rates=(20, 7), depths=(22, 10))
    titles = [spec.title for spec in suite.specs(named)]
    assert len(set(titles)) == 2


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_parameters_and_flops_are_those_of_the_network(dims: int) -> None:
    spec = sweep.sweep_network(Options(dims=dims), 10, 12, 4)
    assert len(spec.input_shape) == 2 + dims
    model = peers.build_torchvision(spec, memory_efficient=False)
    with FlopCounterMode(display=False) as counter:
        memory.training_step(model, *memory.make_batch(spec, torch.contiguous_format, CPU, 0))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = counter.get_total_flops()
    assert sweep.counted(spec) == {"parameters": parameters, "flops": flops}


@pytest.mark.usefixtures("tiny_sweeps")
@pytest.mark.parametrize(
    ("suite", "values", "dims", "first"),
    [
        ("growth", "--growth-rates 4,6", "", "| growth rate 4"),
        ("depth", "--depths 10,16", "", "| depth 10"),
        ("depth", "--depths 10,16", "--dims 1", "| depth 10"),
    ],
)
def test_small_sweeps(suite: str, values: str, dims: str, first: str, run: Any) -> None:
    chosen = (*values.split(), *dims.split(), "--rounds", "1")
    record, text = run(suite, *chosen, "--parts", "time,inference")
    compared = record["settings"]["peers"]
    assert (len(compared) < len(peers.BASIC_PEERS)) == bool(dims)
    assert seconds(record, "time") == [1] * 2 * len(compared)
    assert cells(text, f"{first}, naive, contiguous")[0] == cells(text, first)[0]
    assert ("## Networks" in text and "of 12 comparisons" in text) or "all 12 comparisons" in text


def test_fits_tell_lines_from_parabolas() -> None:
    _, share = sweep.fitted([(d, 3.0 + 2 * d) for d in (10, 20, 40, 80)])
    assert share == pytest.approx(0, abs=1e-9)
    fit, share = sweep.fitted([(d, 2.0 * d * d) for d in (10, 20, 40, 80)])
    assert share == pytest.approx(1)
    assert fit.endswith("+2·d²")


def test_growth_with_depth_is_on_the_page() -> None:
    record = planned("depth", depths=(10, 16, 22, 40), peers=("naive", "ours-block"))
    values = {case["network"]: case["value"] for case in record["cases"]}
    for row in record["rows"]:
        value = values[row["network"]]
        row["memory"] = figures((value**2 if row["peer"] == "naive" else value) * 8 * MIB)
    text = page(record).split("## How it grows")[1]
    (naive,), (ours,) = (cells(text, f"peak memory, MiB, {name}") for name in ("naive", "densenet"))
    assert (naive[2], ours[2].strip("-")) == ("100.0 %", "0.0 %")


def test_networks_are_checked_and_plain_data() -> None:
    spec = densenet_bc(10, 4, batch_size=2, image_size=16)
    assert NETWORKS["densenet-bc-100"].block_config == (16, 16, 16)
    assert NetworkSpec.from_json({**spec.to_json(), "block_config": [1, 1, 1]}) == spec
    with pytest.raises(ValueError, match="got 23"):
        densenet_bc(23, 12, batch_size=1)
    assert networks.SUITE.known_networks["densenet-100"].title.startswith("DenseNet-100 without")
