"""The command line refuses what it cannot do, keeps what it has, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest

pytest.importorskip("torchvision")

from benchmarks import cli, measure, train
from benchmarks.networks import NETWORKS, densenet_bc
from benchmarks.suites import SUITES, load, step

POSITIVE = "a whole number of at least 1, got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("speed", "argument suite: invalid choice: 'speed'"),
        ("step --device abacus", "unknown --device 'abacus'"),
        ("step --threads 0", f"{POSITIVE} '0'"),
        ("step --rounds many", f"{POSITIVE} 'many'"),
        ("growth --growth-rates 12,x", f"{POSITIVE} 'x'"),
        ("capacity --budgets 512,0", f"{POSITIVE} '0'"),
        ("training --peers naive,fastest", "unknown peer: 'fastest'; there are naive,"),
        ("training --peers monai", "unknown peer: 'monai'; there are naive,"),
        ("step --peers ,", "unknown peer: an empty list"),
        ("step --networks resnet", "unknown network: 'resnet'"),
        ("step --networks densenet-100", "unknown network: 'densenet-100'"),
        ("training --parts inference", "unknown part: 'inference'"),
        ("kernels --parts conv5x5", "unknown part: 'conv5x5'; there are conv1x1_forward,"),
        ("step --quick --full", "not allowed with argument"),
        ("step --amp int8", "invalid choice: 'int8'"),
        ("depth --depths 22,23", "of three blocks is 6·n + 4 (10, 16, ...), got 23"),
        ("depth --networks densenet121", "--networks does not apply to the suite 'depth'"),
        ("training --amp float16", "--amp does not apply to the suite 'training'"),
        ("step --depths 22", "--depths does not apply to the suite 'step'"),
        ("capacity --rounds 3", "--rounds does not apply to the suite 'capacity'"),
        ("kernels --growth-rates 12", "--growth-rates does not apply to the suite 'kernels'"),
        ("growth --peers naive,resnet50", "the peer 'resnet50' builds none of the networks"),
        ("capacity --networks densenet121 --parts depth", "--networks names those of the part"),
        ("kernels --networks fcdensenet-103", "has no shapes of fcdensenet-103"),
        ("all --depths 22 --peers naive", "--peers, --depths: not with 'all'"),
    ],
)
def test_bad_arguments(arguments: str, message: str, refused: Any) -> None:
    assert message in refused(*arguments.split())


def test_output_that_cannot_be_written(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write results to" in refused(output=tmp_path / "file" / "results")


def test_missing_dependency_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks", run_name="__main__")
    assert "error: tqdm: not installed here: `pip install '.[bench]'`" in str(stopped.value.code)


@pytest.mark.parametrize("name", SUITES)
def test_pages_of_runs_without_a_figure(
    name: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "run_tasks", Mock(side_effect=KeyboardInterrupt))
    record, text = run(name, status=cli.INTERRUPTED)
    assert "the results below are partial" in text and f"# {load(name).title}" in text
    assert not record["complete"] and "| " not in text
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True], ids=["terminated", "failed"])
def test_a_run_that_stops_in_between_keeps_what_it_has(
    fails: bool, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sixth_ends() -> Iterator[Any]:
        yield from [DEFAULT] * 5
        if fails:
            raise RuntimeError("no more of that")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "timed", Mock(wraps=measure.timed, side_effect=sixth_ends()))
    chosen = ["--parts", "training", "--peers", "ours-none", "--growth-rates", "12"]
    handler = signal.getsignal(signal.SIGTERM)
    ends = pytest.raises(RuntimeError, match="no more of that") if fails else nullcontext()
    with ends:
        run("training", *chosen, "--rounds", "8", status=cli.INTERRUPTED)
    assert signal.getsignal(signal.SIGTERM) is handler
    record = json.loads((tmp_path / "training.json").read_text())
    assert [len(row["training"]["losses"]) for row in record["rows"]] == [3, 2]
    text = (tmp_path / "training.md").read_text()
    assert ("RuntimeError: no more of that" if fails else "Interrupted") in text
    assert (tmp_path / "training.svg").exists()


GROWTH = ("growth", "--growth-rates", "4,6", "--rounds", "1", "--parts", "time,inference")
GROWTH = (*GROWTH, "--peers", "naive,ours-none")


@pytest.mark.usefixtures("tiny_sweeps")
def test_an_interrupted_run_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []

    def interleave(calls: Any, *arguments: Any, **named: Any) -> None:
        if len(saved) == 2:
            next(iter(named["times"].values())).append(1.0)
            raise KeyboardInterrupt
        measure.interleave(calls, *arguments, **named)
        saved.append((tmp_path / "growth.json").exists())

    with monkeypatch.context() as patch:
        patch.setattr(step, "interleave", interleave)
        before, text = run(*GROWTH, status=cli.INTERRUPTED)
    assert saved == [False, True]
    assert "in all 2 comparisons" in text or "of 2 comparisons" in text
    times = [row["time"]["seconds"] for row in before["rows"]]
    assert [len(seconds) for seconds in times] == [1, 1, 1, 0]
    (tmp_path / "growth.json").write_text(json.dumps({**before, "minutes": 100.0}))
    after, _ = run(*GROWTH, "--resume")
    assert after["complete"] and after["minutes"] > 100
    assert after["rows"][:2] == before["rows"][:2]
    assert [len(row["time"]["seconds"]) for row in after["rows"]] == [1] * 4


@pytest.mark.usefixtures("tiny_sweeps")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "there is nothing to resume"),
        (lambda text: "{", "is not a record of results"),
        (lambda text: "[]", "it holds no rows"),
        (lambda text: text.replace('"rounds": 1', '"rounds": 2'), "its rounds is 2, and now it is"),
        (lambda text: re.sub(r'"threads": \d+', '"threads": 77', text), "its threads is 77"),
    ],
    ids=["missing", "broken", "list", "settings", "machine"],
)
def test_only_the_same_run_is_resumed(
    change: Callable[[str], str] | None,
    words: str,
    run: Any,
    refused: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "growth.json"
    monkeypatch.setattr(cli, "run_tasks", lambda *given, **named: None)
    if change:
        run(*GROWTH)
        path.write_text(change(path.read_text()))
    assert words in refused(*GROWTH, "--resume", "--device", "cpu")


# ---- All of them


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of `all` that take no time."""
    monkeypatch.setattr(cli, "SUITES_OF_ALL", ("step", "networks"))
    monkeypatch.setattr(step, "MAIN_NETWORKS", ("tiny",))
    monkeypatch.setattr(step, "BASIC_PEERS", ("naive", "ours-none"))
    monkeypatch.setattr(step.Step, "parts", ("inference",))
    monkeypatch.setattr("benchmarks.suites.networks.MAIN_NETWORKS", ("tiny",))
    monkeypatch.setattr("benchmarks.suites.networks.QUICK_PEERS", ("naive", "ours-none"))
    monkeypatch.setitem(NETWORKS, "tiny", densenet_bc(10, 4, batch_size=2, image_size=8))


ALL = ["all", "--no-progress", "--device", "cpu", "--output"]


@pytest.mark.usefixtures("two")
def test_all_suites_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ALL, str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Measurements\n\n- [One training step")
    assert "Minutes: step 0, networks 0." in text
    assert text.index("comparisons of one of its modes") < text.index('<a id="step"></a>')
    for name in ("step", "networks"):
        assert f'<a id="{name}"></a>\n\n## {load(name).title}' in text
        assert f"]({name}.png)" in text
    before = json.loads((tmp_path / "step.json").read_text())
    assert cli.main([*ALL, str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "step.json").read_text())["rows"] == before["rows"]
    assert "==== networks" in capsys.readouterr().out


@pytest.mark.usefixtures("two")
def test_a_suite_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first_fails = [RuntimeError("no more of that"), DEFAULT]
    monkeypatch.setattr(cli, "run_tasks", Mock(wraps=cli.run_tasks, side_effect=first_fails))
    assert cli.main([*ALL, str(tmp_path)]) == 1
    text = (tmp_path / "report.md").read_text()
    assert "Stopped by RuntimeError: no more of that: the results below are partial" in text
    assert "RuntimeError: no more of that" in capsys.readouterr().err


def test_all_knows_its_suites() -> None:
    assert set(cli.SUITES_OF_ALL) < set(SUITES)
    for name in SUITES:
        assert load(name).title and load(name).options <= set(cli.SUITE_FLAGS)
