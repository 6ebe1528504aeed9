"""The benchmarks measure what they say, and their command line refuses what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, datasets, digits, measure, memory, peers, report, train
from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc
from benchmarks.suites import SUITES, load, training_page

CPU = torch.device("cpu")
MIB = 2**20
TINY = densenet_bc(10, 4, batch_size=2, image_size=16)
PROC = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")


@pytest.mark.parametrize("compression", [0.5, 0.7])
@pytest.mark.parametrize(
    "spec",
    [TINY, replace(NETWORKS["densenet121"], block_config=(2, 2), batch_size=1)],
    ids=lambda spec: spec.name,
)
def test_all_peers_share_names_and_function(spec: NetworkSpec, compression: float) -> None:
    spec = replace(spec, compression=compression, num_classes=5, image_size=32)
    state = peers.initial_state(spec, seed=3)
    images = torch.randn(spec.input_shape, dtype=torch.float64)
    outputs = {}
    for name in peers.BASIC_PEERS:
        peer = peers.PEERS[name]
        model = peers.build(peer, spec, state, device=CPU, dtype=torch.float64).eval()
        assert list(model.state_dict()) == list(state)
        with torch.no_grad():
            outputs[name] = model(images.contiguous(memory_format=peer.memory_format))
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["naive"], rtol=1e-9, atol=1e-12)


def test_initial_state_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds GPUs"))
    before = torch.get_rng_state()
    first, again = peers.initial_state(TINY, 1), peers.initial_state(TINY, 1)
    other = peers.initial_state(TINY, 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_network_depth_is_checked() -> None:
    assert NETWORKS["densenet-bc-100"].block_config == (16, 16, 16)
    assert NetworkSpec.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    with pytest.raises(ValueError, match="got 23"):
        densenet_bc(23, 12, batch_size=1)


def test_digits_are_split_and_normalised() -> None:
    data = digits.load(size=16)
    assert data.train_images.shape == (1437, 1, 16, 16)
    assert data.test_images.shape == (360, 1, 16, 16)
    assert data.train_images.mean().abs() < 1e-4
    batches = list(datasets.batches(data, 700, 5, seed=0))
    assert [len(labels) for _, labels in batches] == [700] * 5
    first = torch.cat([batches[0][0], batches[1][0]])
    assert len(first.flatten(1).unique(dim=0)) > 1390  # an epoch draws no image twice


def test_tables_line_up() -> None:
    table = report.Table(("name", "MiB"), [("a", "1"), ("longer", "1,234")])
    assert table.markdown().splitlines() == [
        "| name   |   MiB |",
        "| ------ | ----: |",
        "| a      |     1 |",
        "| longer | 1,234 |",
    ]
    assert report.mebibytes(1.5 * MIB) == "1.5"
    assert report.mebibytes(None) == report.ratio(1.0, None) == report.MISSING
    assert report.ratio(3.0, 2.0) == "1.50×"


def test_stages_and_differences() -> None:
    assert training_page.stage_losses([1, 3, 5, 7, 9], 2) == [2, 7]
    assert training_page.stage_losses([4.0], 2) == [4]
    assert training_page.stage_losses([], 2) == []
    assert training_page.largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert training_page.largest_difference([float("nan")], [1.0]) == float("inf")


MAIN_JOB = ["--threads", "1", "--no-progress", "--growth-rates", "12", "--rounds", "3"]


@PROC
def test_main_job_writes_its_results_and_the_losses_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = [*MAIN_JOB, "--peers", "naive-channels-last,ours-bottleneck"]
        assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"training.md", "training.json", "training.png", "training.svg"}
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["complete"]
    assert record["environment"]["threads"] == 1
    assert [entry["peer"] for entry in record["memory"]] == [
        "naive",
        "naive-channels-last",
        "ours-bottleneck",
    ]
    assert all(entry["peak_gradients_allocated"] > MIB for entry in record["memory"])
    assert all(0 <= entry["test_accuracy"] <= 1 for entry in record["training"])
    reference, *others = (entry["losses"] for entry in record["parity"])
    for losses in others:
        assert losses == pytest.approx(reference, rel=1e-9)
    test_losses = [entry["test_loss"] for entry in record["parity"]]
    assert test_losses == pytest.approx([test_losses[0]] * 3, rel=1e-9)
    text = (tmp_path / "training.md").read_text()
    assert "![" in text
    printed = capsys.readouterr().out
    assert all(line in printed for line in text.splitlines() if line.startswith("| k=12"))
    assert "**NO**" not in text
    assert "Machine:" in text


def test_disagreement_is_flagged_and_fails() -> None:
    record = load("training").plan(cli.Options(growth_rates=(12,), peers=("ours-none",)))
    for peer, last in (("naive", 2.0), ("ours-none", 2.001)):
        losses = [2.5, 2.5, 2.5, last, last, last]
        record["parity"].append({"growth_rate": 12, "peer": peer, "losses": losses, "seconds": []})
    (text,) = load("training").failures(record)
    assert "ours-none" in text
    assert "5.0e-04" in text
    record.update(command="", complete=True, environment=_environment())
    assert "**NO**" in load("training").page(record).markdown()


def test_memory_that_was_not_measured_fails() -> None:
    record = load("training").plan(cli.Options(growth_rates=(12,), peers=("ours-none",)))
    record["memory"] = [{"growth_rate": 12, "peer": "naive", "error": "does not fit"}]
    assert load("training").failures(record) == ["k=12, naive: does not fit"]


def test_test_loss_is_judged_for_the_networks_that_can_agree() -> None:
    names = ("naive", "memory-efficient", "ours-none")
    record = load("training").plan(cli.Options(growth_rates=(12,), peers=names))
    for peer, test_loss in zip(names, (2.0, 2.1, 2.2), strict=True):
        entry = {"growth_rate": 12, "peer": peer, "losses": [2.5], "seconds": [1.0]}
        record["parity"].append({**entry, "test_loss": test_loss})
    (text,) = load("training").failures(record)
    assert "test loss of ours-none differs from naive's by 1.0e-01" in text
    record.update(command="", complete=True, environment=_environment())
    page = load("training").page(record).markdown()
    assert page.count("**NO**") == 2
    assert "twice a step" in page


def _environment() -> dict[str, Any]:
    from benchmarks.environment import describe

    return describe(CPU)


@pytest.mark.parametrize("built", [True, False])
def test_pages_name_the_kernels_of_the_device(built: bool) -> None:
    environment = _environment()
    assert not any(
        key.rpartition("cuda_")[2] == "extension" for key in environment["densenet_fast"]
    )
    environment.update(device="cuda", device_name="A GPU")
    environment["densenet_fast"].update(
        cuda=built, cuda_reason="no nvcc", cuda_architectures=["8.0", "9.0"], cuda_nvcc="CUDA 13.0"
    )
    text = report.environment_text(environment)
    expected = "CUDA kernels for 8.0, 9.0, built by CUDA 13.0"
    assert (expected if built else "**no CUDA kernels** (no nvcc)") in text


def test_default_device_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    arguments = cli.make_parser().parse_args(["--output", str(tmp_path)])
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert cli.make_options(arguments)[1].device == torch.device(expected)


@pytest.mark.parametrize("name", SUITES)
def test_pages_of_interrupted_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load(name), "run", interrupt)
    status = cli.main([name, "--no-progress", "--output", str(tmp_path)])
    assert status == cli.INTERRUPTED
    assert "partial" in (tmp_path / f"{name}.md").read_text()
    assert not json.loads((tmp_path / f"{name}.json").read_text())["complete"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True], ids=["terminated", "failed"])
def test_training_that_stops_in_between_keeps_what_it_has(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def timed(call: Callable[[], object], device: torch.device) -> float:
        nonlocal steps
        steps += 1
        if steps == 6:
            if fails:
                raise RuntimeError("no more of that")
            os.kill(os.getpid(), signal.SIGTERM)
        return measure.timed(call, device)

    monkeypatch.setattr(train, "timed", timed)
    arguments = ["--no-progress", "--parts", "training", "--peers", "ours-none"]
    arguments += ["--growth-rates", "12", "--rounds", "8", "--output", str(tmp_path)]
    handler = signal.getsignal(signal.SIGTERM)
    if fails:
        with pytest.raises(RuntimeError, match="no more of that"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == cli.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is handler
    record = json.loads((tmp_path / "training.json").read_text())
    assert [len(entry["losses"]) for entry in record["training"]] == [3, 2]
    text = (tmp_path / "training.md").read_text()
    assert ("RuntimeError: no more of that" if fails else "Interrupted") in text
    assert "the results below are partial" in text
    assert (tmp_path / "training.svg").exists()


def test_stages_of_a_run_that_has_none_are_not_judged() -> None:
    record = load("training").plan(cli.Options(growth_rates=(12,), peers=("ours-none",)))
    for peer in ("naive", "ours-none"):
        record["parity"].append({"growth_rate": 12, "peer": peer, "losses": [], "seconds": []})
    record.update(command="", complete=False, environment=_environment())
    assert not load("training").failures(record)
    rows = load("training").page(record).markdown().split("## Agreement")[1].splitlines()
    assert not any("yes" in row or "NO" in row for row in rows)


def test_step_suite_on_a_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    arguments = ["step", "--no-progress", "--networks", "tiny", "--parts", "time,inference"]
    assert cli.main([*arguments, "--rounds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    for part in ("time", "inference"):
        assert [len(entry["seconds"]) for entry in record[part]] == [2] * len(peers.BASIC_PEERS)
    assert "speed by median" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize("amp", memory.AMP)
def test_step_suite_under_autocast(
    amp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.append(
                torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            )
            return super().forward(input)

    def build(spec: NetworkSpec) -> nn.Module:
        model = peers.build_torchvision(spec, memory_efficient=False)
        model.classifier = Watched(model.classifier.in_features, spec.num_classes)
        return model

    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    monkeypatch.setitem(peers.PEERS, "naive", replace(peers.PEERS["naive"], build=build))
    arguments = ["step", "--no-progress", "--networks", "tiny", "--peers", "naive", "--amp", amp]
    arguments += ["--device", "cpu", "--parts", "time,inference", "--rounds", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert seen == [memory.AMP[amp]] * 4
    assert (f"under {amp} autocast" in (tmp_path / "step.md").read_text()) == (amp != "none")


@PROC
def test_child_measures_under_autocast() -> None:
    spec = replace(TINY, image_size=32, batch_size=32)
    plain, half = (
        memory.measure_in_child(memory.MemoryCase(spec, "naive", threads=1, amp=amp))
        for amp in ("none", "bfloat16")
    )
    assert 0.45 < half.saved_for_backward / plain.saved_for_backward < 0.6


def test_case_that_does_not_fit_is_reported_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(case: memory.MemoryCase) -> memory.StepMemory:
        if case.peer == "naive":
            raise measure.MeasurementError("does not fit")
        return memory.StepMemory(8 * MIB, 9 * MIB, 7 * MIB, 7 * MIB, MIB)

    monkeypatch.setattr(memory, "measure_in_child", measured)
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    arguments = ["step", "--no-progress", "--networks", "tiny", "--parts", "memory"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 1
    text = (tmp_path / "step.md").read_text()
    assert "- naive: does not fit" in text
    assert "8.0" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "unknown suite 'speed'; there are training, step"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--device", "meta"], "cannot measure on device 'meta'"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--threads", "0"], "a whole number of at least 1, got '0'"),
        (["--rounds", "many"], "got 'many'"),
        (["--growth-rates", "12,x"], "got 'x'"),
        (["--peers", "naive,fastest"], "unknown peer: 'fastest'; there are naive,"),
        (["--peers", ","], "unknown peer: an empty list"),
        (["step", "--networks", "resnet"], "unknown network: 'resnet'"),
        (["--parts", "inference"], "unknown part: 'inference'"),
        (["--networks", "densenet121"], "--networks does not apply to the suite 'training'"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--amp", "float16"], "--amp does not apply to the suite 'training'"),
        (["step", "--amp", "int8"], "invalid choice: 'int8'"),
        (["depth", "--depths", "22,23"], "of three blocks is 6·n + 4 (10, 16, ...), got 23"),
        (["depth", "--depths", "x"], "a whole number of at least 1, got 'x'"),
        (["depth", "--networks", "densenet121"], "--networks does not apply to the suite 'depth'"),
        (["growth", "--peers", "fastest"], "unknown peer: 'fastest'"),
        (
            ["growth", "--parts", "speed"],
            "unknown part: 'speed'; there are memory, time, inference",
        ),
        (["step", "--depths", "22"], "--depths does not apply to the suite 'step'"),
        (["capacity", "--parts", "width"], "unknown part: 'width'; there are batch, depth"),
        (["capacity", "--networks", "resnet"], "unknown network: 'resnet'"),
        (["capacity", "--peers", "fastest"], "unknown peer: 'fastest'"),
        (["capacity", "--budgets", "512,0"], "a whole number of at least 1, got '0'"),
        (["capacity", "--rounds", "3"], "--rounds does not apply to the suite 'capacity'"),
        (["step", "--budgets", "512"], "--budgets does not apply to the suite 'step'"),
        (["kernels", "--parts", "conv5x5"], "unknown part: 'conv5x5'; there are conv1x1_forward,"),
        (["kernels", "--networks", "resnet"], "unknown network: 'resnet'"),
        (
            ["kernels", "--growth-rates", "12"],
            "--growth-rates does not apply to the suite 'kernels'",
        ),
        (["kernels", "--peers", "naive"], "--peers does not apply to the suite 'kernels'"),
        (["kernels", "--rounds", "0"], "a whole number of at least 1, got '0'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["--output", str(tmp_path / "file" / "results")])
    assert "cannot write results to" in capsys.readouterr().err


def test_missing_dependency_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.REQUIREMENTS, "no_such_module_at_all", "nosuch-distribution")
    with pytest.raises(SystemExit):
        cli.main([])
    text = capsys.readouterr().err
    assert "the benchmarks need nosuch-distribution" in text
    assert "pip install '.[bench]'" in text
