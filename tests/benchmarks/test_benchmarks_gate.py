"""The gate fails for memory alone, and `all` makes one page of all suites' pages."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, everything, memory
from benchmarks.environment import describe
from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc
from benchmarks.suites import Options, gate

MIB = 2**20


def filled(memory_ratio: float, speed: float) -> dict[str, Any]:
    """A record of one network with these ratios everywhere."""
    record = gate.plan(Options())
    spec = NetworkSpec.from_json(record["settings"]["networks"][0])
    for peer in gate.PEERS:
        ours = peer.startswith("ours")
        peak = int(100 * MIB / memory_ratio) if ours else 100 * MIB
        entry = asdict(memory.StepMemory(peak, peak, peak, peak, MIB))
        record["memory"].append({"network": spec.title, "peer": peer, **entry})
        for part in ("time", "inference"):
            seconds = [1 / speed if ours else 1.0]
            record[part].append({"network": spec.title, "peer": peer, "seconds": seconds})
    record.update(command="", complete=True, environment=describe(torch.device("cpu")))
    return record


def test_nothing_fails_above_the_floors() -> None:
    record = filled(memory_ratio=6, speed=1.5)
    assert not gate.failures(record)
    text = gate.page(record).markdown()
    assert text.count(" above |") == 7
    assert "**below**" not in text


def test_a_slow_machine_is_reported_and_lost_memory_fails() -> None:
    slow = filled(memory_ratio=6, speed=0.5)
    assert not gate.failures(slow)
    assert gate.page(slow).markdown().count("**below**") == 4
    large = filled(memory_ratio=4, speed=1.5)
    assert len(gate.failures(large)) == 2
    assert "at least 5.0× expected" in gate.failures(large)[0]


def test_what_was_not_measured_is_on_the_page() -> None:
    record = filled(memory_ratio=6, speed=1.5)
    record["time"][0].update(seconds=[], error="does not fit")
    (failure,) = gate.failures(record)
    assert failure.endswith("naive-channels-last: does not fit")
    assert f"- training step of {failure}" in gate.page(record).markdown()


def test_every_floor_belongs_to_something_that_is_measured() -> None:
    titles = [spec.title for spec in gate.NETWORKS_OF_THE_GATE]
    assert list(gate.FLOORS) == titles
    parts_of = gate.plan(Options())["settings"]["parts_of"]
    assert parts_of == {title: list(floors) for title, floors in gate.FLOORS.items()}
    assert "memory" not in gate.plan(Options(parts=("time",)))["settings"]["parts_of"][titles[0]]
    for floors in gate.FLOORS.values():
        assert set(floors) <= set(gate.PARTS)
        assert all(set(peers) < set(gate.PEERS) for peers in floors.values())


def test_all_suites_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "SUITES_OF_ALL", ("step", "predict"))
    monkeypatch.setattr("benchmarks.suites.step.MAIN_NETWORKS", ("tiny",))
    monkeypatch.setattr("benchmarks.suites.step.PARTS", ("inference",))
    monkeypatch.setattr("benchmarks.suites.step.BASIC_PEERS", ("naive", "ours-none"))
    monkeypatch.setattr("benchmarks.suites.predict.MAIN_NETWORKS", ("tiny",))
    monkeypatch.setitem(NETWORKS, "tiny", densenet_bc(10, 4, batch_size=2, image_size=8))
    arguments = ["all", "--no-progress", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Measurements\n\n- [One training step")
    for name in ("step", "predict"):
        assert f'<a id="{name}"></a>' in text
        assert f"![{name}" in text or f"]({name}.png)" in text
    assert "\n### " in text
    before = json.loads((tmp_path / "step.json").read_text())
    assert cli.main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "step.json").read_text())["inference"] == before["inference"]
    assert "==== predict" in capsys.readouterr().out


def test_a_suite_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no more of that")

    monkeypatch.setattr(cli, "SUITES_OF_ALL", ("step", "predict"))
    monkeypatch.setattr("benchmarks.suites.step.run", fails)
    monkeypatch.setattr("benchmarks.suites.predict.MAIN_NETWORKS", ("densenet-bc-100",))
    monkeypatch.setattr("benchmarks.host.measure", lambda *_: [])
    arguments = ["all", "--no-progress", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(arguments) == 1
    text = (tmp_path / "report.md").read_text()
    assert "Stopped by RuntimeError: no more of that: the results below are partial" in text
    assert '<a id="predict"></a>' in text
    assert json.loads((tmp_path / "predict.json").read_text())["complete"]
    assert "RuntimeError: no more of that" in capsys.readouterr().err


def test_all_knows_its_suites() -> None:
    assert set(everything.SUITES_OF_ALL) <= set(cli.SUITES)


def test_options_of_single_suites_do_not_go_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["all", "--depths", "22", "--peers", "naive"])
    assert "--peers, --depths: not with 'all'" in capsys.readouterr().err


def test_gate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(gate.SMALL_121, block_config=(1, 1), image_size=32)
    monkeypatch.setattr(gate, "NETWORKS_OF_THE_GATE", (tiny,))
    floors = {"memory": {}, "time": {"ours-none": 1e-3}, "inference": {"ours-bottleneck": 1e3}}
    monkeypatch.setattr(gate, "FLOORS", {tiny.title: floors})
    arguments = ["gate", "--no-progress", "--device", "cpu", "--rounds", "1"]
    arguments += ["--parts", "time,inference", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    text = (tmp_path / "gate.md").read_text()
    assert "above" in text
    assert "**below**" in text
