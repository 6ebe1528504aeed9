"""Bad input of `densenet-fast`: exit status 2, a message that names it, and nothing written."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from training_runs import TINY, content, train, write_folder, write_idx

from densenet_fast.train import loop, requirements, storage
from densenet_fast.train.command import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert train(folder, output, "--epochs", "1") == 0
    return output


def refused(capsys: Captured, act: Callable[[], int], *said: str) -> None:
    """`act` ends with exit status 2, and its message has all of `said`."""
    status: object
    try:
        status = act()
    except SystemExit as left:  # argparse's
        status = left.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    for text in said:
        assert text in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "resnet50"), ("'resnet50'", "densenet121", "densenet-bc")),
        (("--opt", "adam"), ("'adam'", "sgd_nesterov", "rmsprop")),
        (("--lr-scheduler", "poly"), ("'poly'", "cosineannealinglr")),
        (("--auto-augment", "all"), ("'all'", "ta_wide")),
        (("--lr", "0"), ("--lr", "above 0", "'0'")),
        (("--lr", "nan"), ("--lr", "'nan'")),
        (("--epochs", "0"), ("--epochs", "at least 1", "'0'")),
        (("--label-smoothing", "1.5"), ("at most 1", "'1.5'")),
        (("--memory-budget", "100"), ("--memory-budget 100.0", "--checkpoint-mode auto alone")),
        (("--checkpoint-mode", "auto"), ("--checkpoint-mode auto needs --memory-budget",)),
        (
            ("--checkpoint-mode", "auto", "--memory-budget", "0.01"),
            ("--memory-budget: a training step needs", "MiB"),
        ),
        (("--amp-dtype", "float16"), ("--amp-dtype float16 applies to --amp alone",)),
        (("--opt", "adamw", "--momentum", "0.5"), ("--momentum 0.5 applies to --opt sgd",)),
        (("--lr-min", "0.1"), ("--lr-min 0.1 applies to --lr-scheduler cosineannealinglr",)),
        (("--model-ema-steps", "4"), ("--model-ema-steps 4 applies to --model-ema alone",)),
        (("--model", "densenet121", "--depth", "40"), ("--depth 40 applies to --model",)),
        (("--depth", "11"), ("--depth must be 6n + 4", "got 11")),
        (("--lr-warmup-epochs", "90"), ("--lr-warmup-epochs 90 must be below --epochs 90",)),
        (("--freeze", "features.block9"), ("'features.block9'", "features.denseblock1")),
        (("--freeze", ""), ("--freeze ''",)),
        (("--weights", "nowhere.pth"), ("nowhere.pth", "no such file")),
        (("--device", "gpu"), ("'gpu'", "cpu, cuda or cuda:N")),
        (("--device", "cuda:99"), ("cuda:99", "PyTorch sees")),
        (("--val-crop-size", "40", "--val-resize-size", "30"), ("40", "30")),
        (("--crop-pct", "0.9", "--val-resize-size", "30"), ("--crop-pct 0.9", "the same")),
        (("--no-aug", "--hflip", "0.5"), ("--hflip 0.5 applies to training without --no-aug",)),
        (("--no-aug", "--scale", "0.5", "1"), ("--scale 0.5 1.0 applies to training without",)),
        (("--no-aug", "--mixup-alpha", "1"), ("--mixup-alpha 1.0 applies to training without",)),
        (("--scale", "0.9", "0.5"), ("--scale: 0.9 is above 0.5",)),
        (("--ratio", "2", "1.5"), ("--ratio: 2.0 is above 1.5",)),
        (("--ratio", "0", "1"), ("--ratio", "above 0")),
        (("--no-aug", "--ratio", "1", "1"), ("--ratio 1.0 1.0 applies to training without",)),
        (("--val-split", "0.2"), ("--val-split applies to images in files",)),
        (("--class-map", "any.txt"), ("--class-map applies to images in files",)),
        (("--std", "0"), ("--std", "above 0")),
        (("--train-crop-size", "3"), ("images of 3×3", "too small")),
        (("--batch-size", "21", "--train-crop-size", "4"), ("1 at a time", "more than 1 value")),
        (("--resume", "nowhere.pt"), ("no checkpoint nowhere.pt",)),
        (("--sync-bn",), ("--sync-bn needs GPUs here",)),
        (("--download",), ("--download does not apply",)),
        (("--epochs", "2", "--no-such-flag"), ("--no-such-flag",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_flags(
    folder: Path, tmp_path: Path, capsys: Captured, flags: tuple[str, ...], said: tuple[str, ...]
) -> None:
    if flags == ("--sync-bn",) and _synchronizes_on_cpu():
        pytest.skip("this version runs SyncBatchNorm on the CPU")
    refused(capsys, lambda: train(folder, tmp_path / "out", *flags), *said)
    assert not (tmp_path / "out").exists()


def _synchronizes_on_cpu() -> bool:
    import densenet_fast

    model = densenet_fast.EfficientDenseNet(2, (1,), 4, small_inputs=True)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return densenet_fast.fusion_report(converted).all_fused


def test_images_too_small_for_the_network(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    flags = ("--model", "densenet121", "--data", str(folder), "--output-dir", str(tmp_path / "out"))
    refused(capsys, lambda: main(["train", *flags]), "images of 28×28", "too small", "at least")
    assert not (tmp_path / "out").exists()


def test_data_that_are_not_there(tmp_path: Path, capsys: Captured) -> None:
    def run(*flags: str) -> Callable[[], int]:
        return lambda: main(["train", *flags, "--output-dir", str(tmp_path / "out")])

    refused(capsys, run("--data", "cifar11"), "'cifar11'", "cifar10", "digits", "fashion-mnist")
    refused(capsys, run("--data", "cifar11", "--data-path", str(tmp_path)), "'cifar11'", "cifar10")
    where = ("--data-path", str(tmp_path / "none"))
    refused(capsys, run("--data", "cifar10", *where), "--data cifar10", "--download fetches it")
    refused(capsys, run("--data", "fashion-mnist", *where), "no such folder")
    refused(capsys, run("--data", "digits", *where), "does not apply to --data digits")
    refused(capsys, run("--data", "digits", "--download"), "does not apply to --data digits")
    (tmp_path / "empty").mkdir()
    refused(capsys, run("--data", str(tmp_path / "empty")), "train: no such folder")
    assert not (tmp_path / "out").exists()


def test_folders_without_the_same_classes(tmp_path: Path, capsys: Captured) -> None:
    images = write_folder(tmp_path / "images")

    def run() -> int:
        return main(["train", "--data-path", str(images), "--output-dir", str(tmp_path / "out")])

    (images / "train" / "cat").rename(images / "train" / "tiger")
    refused(capsys, run, "same classes", "tiger in train/ alone", "cat in val/ alone")
    for part in ("train", "val"):
        shutil.rmtree(images / part / "dog")
    (images / "train" / "tiger").rename(images / "train" / "cat")
    refused(capsys, run, "two classes at least, found cat alone")
    for part in ("train", "val"):
        shutil.rmtree(images / part / "cat")
    refused(capsys, run, "find any class")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_corrupt_images(tmp_path: Path, capsys: Captured, workers: str) -> None:
    images, output = write_folder(tmp_path / "images"), tmp_path / "out"
    whole = images / "train" / "cat" / "0.png"
    cut = images / "train" / "dog" / "1.png"
    cut.write_bytes(whole.read_bytes()[:-400])
    other = images / "val" / "dog" / "2.png"
    other.write_text("no image")
    sizes = ("--train-crop-size", "32", "--val-resize-size", "40", "--val-crop-size", "32")
    flags = ("--workers", workers, "--epochs", "1", *sizes)
    refused(
        capsys, lambda: train(images, output, *flags), f"corrupt image {cut}", "and 1 more", "skip"
    )
    assert not output.exists()
    assert train(images, output, *flags, "--on-corrupt", "skip") == 0
    assert f"{images}: 2 corrupt images left out" in capsys.readouterr().out
    found = content(output)["data"]
    assert (found["train"], found["val"]) == (5, 5)


def test_image_that_breaks_later(tmp_path: Path, capsys: Captured) -> None:
    """Without the check, or when it was overwritten since: the error names it, in a worker too."""
    images = write_folder(tmp_path / "images")
    broken = images / "train" / "dog" / "1.png"
    broken.write_text("no image")
    sizes = ("--train-crop-size", "32", "--val-resize-size", "40", "--val-crop-size", "32")
    for workers in ("0", "1"):
        flags = ("--workers", workers, "--no-image-check", *sizes)
        refused(
            capsys,
            lambda: train(images, tmp_path / workers, *flags),  # noqa: B023
            f"error: {broken} cannot be read",
        )
        assert not multiprocessing.active_children()
    flags = ("--no-image-check", "--on-corrupt", "skip")
    refused(capsys, lambda: train(images, tmp_path / "out", *flags), "--on-corrupt skip needs")


def test_checkpoints_of_something_else(
    folder: Path, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    last = trained / "last.pt"

    def resumed(*flags: str, path: Path = last) -> Callable[[], int]:
        return lambda: train(folder, tmp_path / "out", "--resume", str(path), *flags)

    refused(capsys, resumed("--depth", "16"), "another network", "depth 10", "depth 16")
    refused(capsys, resumed("--growth-rate", "4"), "k = 2", "k = 4")
    many = ("--weight-decay", "0.5", "--opt", "adamw", "--seed", "7")
    refused(
        capsys,
        resumed(*many),
        "--opt was sgd and is adamw",
        "--seed was 0 and is 7",
        "--weight-decay was 0.0001 and is 0.5",
        "--momentum was 0.9 and is None",
    )
    found = content(trained)
    torch.save({**found, "classes": list("abcdefghij")}, tmp_path / "classes.pt")
    refused(capsys, resumed(path=tmp_path / "classes.pt"), "other classes: 10 (a, b, c, d, e, ...)")
    fewer = {**found["architecture"], "num_classes": 5}
    torch.save({**found, "architecture": fewer}, tmp_path / "five.pt")
    refused(capsys, resumed(path=tmp_path / "five.pt"), "classes: expected 5 names", "got 10")
    torch.save(found["model"], tmp_path / "weights.pt")
    refused(capsys, resumed(path=tmp_path / "weights.pt"), "no checkpoint of densenet-fast train")
    data = last.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    refused(capsys, resumed(path=tmp_path / "cut.pt"), "cut.pt is no whole checkpoint")
    (tmp_path / "none.pt").write_bytes(b"")
    refused(capsys, resumed(path=tmp_path / "none.pt"), "none.pt is no whole checkpoint")
    assert not (tmp_path / "out").exists()


def test_other_images_than_before(
    folder: Path, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    found = content(trained)
    torch.save({**found, "data": {**found["data"], "train": 21}}, tmp_path / "data.pt")
    resume = ("--resume", str(tmp_path / "data.pt"))
    refused(
        capsys,
        lambda: train(folder, tmp_path / "out", *resume),
        "training images: 21 before, 22 now",
    )


def test_harmless_flags_may_differ(folder: Path, trained: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "2", "--workers", "1", "--print-freq", "1", "--save-steps", "3")
    resume = ("--resume", str(trained / "last.pt"))
    assert train(folder, tmp_path / "out", *flags, *resume) == 0
    assert content(tmp_path / "out")["epoch"] == 2


def test_another_training_is_not_written_over(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert train(folder, tmp_path, "--epochs", "1") == 0
    before = (tmp_path / "last.pt").read_bytes()
    refused(capsys, lambda: train(folder, tmp_path), "last.pt is there already", "--overwrite")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert train(folder, tmp_path, "--epochs", "1", "--seed", "1", "--overwrite") == 0
    assert content(tmp_path)["arguments"]["seed"] == 1


def test_output_that_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    refused(capsys, lambda: train(folder, output), "cannot write to --output-dir", str(output))
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1000)
    refused(
        capsys,
        lambda: train(folder, tmp_path / "out"),
        "the disk is full, the checkpoints need",
        "0.0 MiB are free",
    )
    assert not (tmp_path / "out" / "last.pt").exists()


def test_disk_that_fills_up(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stays whole, and training goes on from it when there is room again."""
    assert train(folder, tmp_path, "--epochs", "1") == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "best.pt", "log.csv")}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(
            capsys,
            lambda: train(folder, tmp_path, "--epochs", "2", "--resume", "auto"),
            "the disk is full",
            "MiB free",
            "is whole, as it was before",
            "--resume",
        )
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert after == before
    assert not list(tmp_path.glob(".*"))
    assert train(folder, tmp_path, "--epochs", "2", "--resume", "auto") == 0
    assert content(tmp_path)["epoch"] == 2


def test_loss_that_is_not_finite(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    assert train(folder, tmp_path, "--epochs", "3", "--lr", "1e30") == 1
    error = capsys.readouterr().err
    assert "the loss is" in error and "--lr" in error


@pytest.mark.parametrize("missing", ["torchmetrics", "tqdm", "torchvision"])
def test_missing_library(monkeypatch: pytest.MonkeyPatch, capsys: Captured, missing: str) -> None:
    original = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == missing else original(name, *rest)

    monkeypatch.setattr(requirements.importlib.util, "find_spec", find)
    said = (missing, "extra `train`", 'pip install "densenet_fast[train]"')
    refused(capsys, lambda: main(["train", *TINY]), *said)


def test_disk_that_fills_up_with_logs(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(loop.Step, "__call__", step)
    said = "the disk is full: [Errno 28] No space left"
    refused(capsys, lambda: train(folder, tmp_path / "out"), said)


def test_commands_that_are_not_given(capsys: Captured) -> None:
    refused(capsys, lambda: main([]), "COMMAND")
    refused(capsys, lambda: main(["tune"]), "'tune'", "predict")
