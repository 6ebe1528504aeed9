"""Numbers that nothing can hold, lack of memory, and the command by its module's name."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from training_runs import train, write_folder, write_idx

from densenet_fast.train import architecture, errors, folders, images, loop, predict
from densenet_fast.train.command import main

Captured = pytest.CaptureFixture[str]
SIZES = ("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32")
# What the allocators of the CPU, the operating system and a loader's parent say.
LACKING = {
    "PyTorch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory.\nMore."),
    "Python": MemoryError(),
    "NumPy": MemoryError("Unable to allocate 8 bytes; out of memory"),
    "system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "killed worker": RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed. "),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def trained(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert train(photographs, output, "--epochs", "1", "--workers", "0", *SIZES) == 0
    return output / "last.pt"


def refused(capsys: Captured, act: Callable[[], int], said: str) -> None:
    """`act` ends with exit status 2 and a message in one line, but for argparse's usage."""
    try:
        status: object = act()
    except SystemExit as left:
        status = left.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert said in error and error.count("error:") == 1 and "Traceback" not in error, error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", str(2**70)), "at most 9223372036854775807, got '1180591620717411303424'"),
        (("--seed", "-1"), "--seed: expected a whole number of at least 0, got '-1'"),
        (("--epochs", "9" * 5000), "--epochs: expected a whole number"),
        (
            ("--growth-rate", "1000000000"),
            "--growth-rate: expected a whole number of at most 10000",
        ),
        (("--depth", "60004"), "--depth: expected a whole number of at most 10000, got '60004'"),
        (("--threads", "1000000000"), "--threads: expected a whole number of at most 1024"),
        (("--workers", "1000000000"), "--workers: expected a whole number of at most 1024"),
        (("--train-crop-size", "1000000000"), "whole number of at most 65536"),
        (("--val-resize-size", "1000000000"), "whole number of at most 65536"),
        (("--lr", "1e300"), "--lr: expected a number above 0 and at most 1e+30, got '1e300'"),
        (("--lr", "1e-300"), "(not below 1e-30 unless 0), got '1e-300'"),
        (("--lr", "inf"), "--lr: expected a number above 0 and at most 1e+30, got 'inf'"),
        (("--mixup-alpha", "1e-320"), "--mixup-alpha: expected a number of at least 0"),
        (("--checkpoint-mode", "auto", "--memory-budget", "1e-30"), "--memory-budget: expected"),
        (
            ("--lr-gamma", "1e20", "--lr-step-size", "1"),
            "--lr-gamma 1e+20 makes --lr 0.05 larger than 1e+30 within --epochs 90",
        ),
        (("--rendezvous-timeout", "1e20"), "--rendezvous-timeout: expected a number above 0"),
        (("--device", "\udcff"), "unknown --device"),
        (("--output-dir", ""), "--output-dir: expected a path, got ''"),
        (("--data-path", ""), "--data-path: expected a path, got ''"),
        (("--output-dir", "a" * 300), "File name too long"),
        (("--resume", "a" * 300), "File name too long"),
        (("--weights", "a" * 300), "File name too long"),
        (("--resume", "/dev/null"), "/dev/null is no checkpoint: expected a regular file"),
        (("--resume", "/"), "/ is no checkpoint: expected a regular file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_flags(
    folder: Path, tmp_path: Path, capsys: Captured, flags: tuple[str, ...], said: str
) -> None:
    refused(capsys, lambda: train(folder, tmp_path / "out", *flags), said)
    assert not (tmp_path / "out").exists()


def test_largest_seed(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path, "--seed", str(2**63 - 1), "--epochs", "2") == 0


@pytest.mark.slow
def test_network_larger_than_the_machine(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before memory is asked for, which some systems give and then take the process away."""
    assert train(folder, tmp_path / "out", "--depth", "9994", "--growth-rate", "10000") == 1
    error = capsys.readouterr().err
    assert "densenet-bc (depth 9994, k = 10000)" in error and "this machine has" in error
    monkeypatch.setattr(architecture.os, "sysconf", lambda _: 9)
    assert train(folder, tmp_path / "out") == 1
    assert "this machine has 0 MiB of memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", LACKING)
def test_lack_of_memory_in_a_step(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def step(*_: object) -> None:
        raise LACKING[kind]

    monkeypatch.setattr(loop.Step, "__call__", step)
    assert train(folder, tmp_path / "out") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert errors.lack_of_memory(LACKING[kind])[:-2] in error
    assert error.endswith(
        ". Try a smaller --batch-size, --amp, or --checkpoint-mode auto with --memory-budget"
    )


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("kind", ["PyTorch", "Python", "NumPy"])
def test_lack_of_memory_while_reading(
    photographs: Path,
    trained: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    workers: str,
) -> None:
    """In the process or in a worker; the image is not to blame."""

    def read(*_: object, **__: object) -> None:
        raise LACKING[kind]

    def said() -> str:
        (error,) = capsys.readouterr().err.splitlines()
        return error

    data = ("--data-path", str(photographs), "--workers", workers)
    checkpoint = ("--checkpoint", str(trained))
    for place, name in ((folders, "read_image"), (images.Image, "open")):  # later, and when checked
        with monkeypatch.context() as patch:
            patch.setattr(place, name, read)
            patch.setattr(predict, "read_image", read)
            assert train(photographs, tmp_path / "out", *SIZES, "--workers", workers) == 1
            assert ". Try a smaller --batch-size, --amp" in said()
            assert main(["evaluate", *checkpoint, *data]) == 1
            assert said().endswith(". Try a smaller --batch-size or fewer --workers")
            assert main(["predict", *checkpoint, str(photographs / "val")]) == 1
            assert said().endswith(". Try a smaller --batch-size")
    assert not multiprocessing.active_children()  # the command would wait for them at its end


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not errors.lack_of_memory(RuntimeError("sizes do not match"))
    assert not errors.lack_of_memory(OSError(errno.ENOENT, "Cannot allocate memory"))
    assert not errors.lack_of_memory(errors.UsageError("out of memory"))


def _module(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "densenet_fast", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )


@pytest.mark.slow
def test_package_is_the_command(folder: Path, tmp_path: Path) -> None:
    """With arguments; without them it says what is installed."""
    wrong = _module("tune", "--lr", "1")
    assert wrong.returncode == 2
    assert "invalid choice: 'tune'" in wrong.stderr and not wrong.stdout
    flags = ("--data-path", str(folder), "--output-dir", str(tmp_path), "--steps", "1")
    small = ("--model", "densenet-bc", "--depth", "10", "--growth-rate", "2")
    done = _module("train", *small, *flags, "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "last.pt").exists()
    plain = _module()
    assert plain.returncode == 0 and plain.stdout.startswith("version:")
