"""A training that was interrupted and resumed is bitwise the one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from training_runs import TINY, assert_same, comparable, content, train, write_idx

from densenet_fast.train import loop, training

STEPS = 6  # of an epoch
RICH = (
    *("--drop-rate", "0.2", "--auto-augment", "ra", "--random-erase", "0.5"),
    *("--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--label-smoothing", "0.1"),
    *("--model-ema", "--model-ema-steps", "2", "--model-ema-decay", "0.9"),
    *("--amp", "--clip-grad-norm", "1", "--lr-scheduler", "cosineannealinglr"),
    *("--lr-warmup-epochs", "1", "--lr-warmup-method", "linear", "--opt", "adamw"),
)
CASES = {"plain": (), "rich": RICH, "float16": ("--amp", "--amp-dtype", "float16")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs without interruption."""
    output = tmp_path_factory.mktemp("whole")
    assert train(folder, output, "--epochs", "3") == 0
    return output


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Which signal comes in which step of this process' trainings."""
    signals: dict[int, int] = {}
    done = 0
    original = loop.Step.__call__

    def step(self: loop.Step, *batch: object) -> object:
        nonlocal done
        done += 1
        if done in signals:
            os.kill(os.getpid(), signals[done])
        return original(self, *batch)

    monkeypatch.setattr(loop.Step, "__call__", step)
    return signals


@pytest.mark.parametrize("name", CASES)
def test_stopped_in_the_middle_of_an_epoch(folder: Path, tmp_path: Path, name: str) -> None:
    flags = (*CASES[name], "--epochs", "3")
    assert train(folder, tmp_path / "whole", *flags) == 0
    parts = tmp_path / "parts"
    assert train(folder, parts, *flags, "--steps", "2", "--workers", "1") == 0
    assert content(parts)["at"] == 2
    assert train(folder, parts, *flags, "--resume", "auto", "--steps", str(STEPS + 3)) == 0
    assert (content(parts)["epoch"], content(parts)["at"]) == (1, 3)
    assert train(folder, parts, *flags, "--resume", str(parts / "last.pt"), "--workers", "2") == 0
    assert_same(comparable(tmp_path / "whole"), comparable(parts))
    best = [content(output, "best.pt")["epoch"] for output in (tmp_path / "whole", parts)]
    assert best[0] == best[1]


def test_interruption_matters_without_resuming_properly(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    """The comparison sees a difference where there is one."""
    assert train(folder, tmp_path, "--epochs", "3", "--seed", "1") == 0
    with pytest.raises(AssertionError):
        assert_same(comparable(whole), comparable(tmp_path))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step(
    folder: Path,
    whole: Path,
    tmp_path: Path,
    killing: dict[int, int],
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
) -> None:
    killing[STEPS + 2] = number
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert train(folder, tmp_path, "--epochs", "3") == status
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (content(tmp_path)["epoch"], content(tmp_path)["at"]) == (1, 2)
    assert train(folder, tmp_path, "--epochs", "3", "--resume", "auto") == 0
    assert_same(comparable(whole), comparable(tmp_path))


def test_signal_while_validating(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training.validate

    def validate(*arguments: object, **named: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", validate)
        assert train(folder, tmp_path, "--epochs", "3") == 143
    assert (content(tmp_path)["epoch"], content(tmp_path)["at"]) == (0, STEPS)
    assert train(folder, tmp_path, "--epochs", "3", "--resume", "auto") == 0
    assert_same(comparable(whole), comparable(tmp_path))


def test_second_signal_acts_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        for _unused in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(loop.Step, "__call__", step)
    assert train(folder, tmp_path, "--epochs", "1") == 130
    assert not (tmp_path / "last.pt").exists()


def test_more_epochs_than_before(folder: Path, whole: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path, "--epochs", "1") == 0
    assert train(folder, tmp_path, "--epochs", "3", "--resume", "auto") == 0
    assert_same(comparable(whole), comparable(tmp_path))


def test_auto_begins_where_nothing_is(folder: Path, whole: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "new", "--epochs", "3", "--resume", "auto") == 0
    assert_same(comparable(whole), comparable(tmp_path / "new"))


def _start(folder: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "densenet_fast.train", *TINY, "--data-path", str(folder))
    rest = ("--output-dir", str(output), "--lr", "0.05", "--batch-size", "4", "--print-freq", "1")
    root = str(Path(__file__).parents[2])
    # Another number of threads would round otherwise.
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [*command, *rest, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": threads},
    )


def _wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_terminated_process(folder: Path, tmp_path: Path) -> None:
    """With workers, all of which get the signal too, as from a terminal or a batch system."""
    flags = ("--epochs", "400", "--workers", "1", "--save-steps", "1000")
    with _start(folder, tmp_path, *flags) as process:
        _wait_for(process, "epoch 1 [3/6]")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if children.exists():
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGTERM)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "--resume auto goes on" in errors and "Traceback" not in errors
    found = content(tmp_path)
    epochs = str(found["epoch"] + 1)
    assert train(folder, tmp_path, "--epochs", epochs, "--resume", "auto") == 0
    assert train(folder, tmp_path / "again", "--epochs", epochs) == 0
    assert_same(comparable(tmp_path / "again"), comparable(tmp_path))


@pytest.mark.slow
def test_killed_process(folder: Path, tmp_path: Path) -> None:
    """Nothing can be done at SIGKILL: training goes on from what was saved before."""
    with _start(folder, tmp_path, "--epochs", "400", "--save-steps", "4") as process:
        _wait_for(process, "epoch 1 [5/6]")
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    found = content(tmp_path)
    assert found["steps"] >= 8  # of the 11th step at least
    epochs = str(found["epoch"] + 1)
    assert train(folder, tmp_path, "--epochs", epochs, "--resume", "auto") == 0
    assert train(folder, tmp_path / "again", "--epochs", epochs) == 0
    assert_same(comparable(tmp_path / "again"), comparable(tmp_path))
