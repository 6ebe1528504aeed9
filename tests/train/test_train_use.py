"""`densenet-fast evaluate` and `predict`, logs, and the example of fine-tuning."""

from __future__ import annotations

import csv
import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from PIL import Image
from training_runs import TIMED, TINY, TRAIN, content, train, write_folder, write_idx

import densenet_fast
from densenet_fast.train.architecture import Architecture
from densenet_fast.train.command import main
from densenet_fast.train.entries import MACHINE_ROW, MULTICLASS, row_of
from densenet_fast.train.transforms import Preprocessing

Captured = pytest.CaptureFixture[str]
SIZES = ("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "images", ("cat", "dog", "eel"))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    ema = ("--model-ema", "--model-ema-decay", "0.5", "--model-ema-steps", "1")
    assert train(images, output, "--epochs", "2", "--workers", "0", *SIZES, *ema) == 0
    return output


def _model(output: Path, name: str) -> tuple[nn.Module, Preprocessing]:
    found = content(output)
    model = Architecture(**found["architecture"]).build()
    model.load_state_dict(found[name])
    return model.eval(), Preprocessing(**found["preprocessing"])


def _probabilities(output: Path, files: list[Path], name: str = "ema") -> torch.Tensor:
    model, plain = _model(output, name)
    transform = plain.transform()
    batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        return model(batch).softmax(1)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_evaluate(images: Path, trained: Path, capsys: Captured, weights: str) -> None:
    flags = ["--checkpoint", str(trained / "last.pt"), "--data-path", str(images)]
    flags += ["--no-ema"] if weights == "model" else []
    assert main(["evaluate", *flags, "--json", "--batch-size", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = sorted((images / "val").rglob("*.png"))
    labels = torch.tensor(
        [sorted({f.parent.name for f in files}).index(f.parent.name) for f in files]
    )
    shares = _probabilities(trained, files, weights)
    assert (found["images"], found["skipped"]) == (9, 0)
    assert found["loss"] == pytest.approx(
        nn.functional.nll_loss(shares.log(), labels).item(), rel=1e-4
    )
    assert found["top1"] == pytest.approx(100 * (shares.argmax(1) == labels).float().mean().item())
    assert found["top5"] == 100  # of three classes
    row = content(trained)["history"][-1]
    prefix = "ema_val" if weights == "ema" else "val"
    assert found["loss"] == pytest.approx(row[f"{prefix}_loss"], rel=1e-5)
    assert main(["evaluate", *flags]) == 0
    assert f"9 images: loss {found['loss']:.4f}, top-1" in capsys.readouterr().out


def test_evaluate_what_does_not_fit(
    images: Path, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    last = str(trained / "last.pt")
    gray = write_idx(tmp_path / "gray")
    wrong = {
        ("--checkpoint", last, "--data-path", str(gray)): "images of 1 channels",
        ("--checkpoint", last, "--data", "digits"): "images of 1 channels",
        ("--data-path", str(images)): "expected --checkpoint FILE, or --model",
        ("--checkpoint", last, "--weights", "DEFAULT"): "expected --checkpoint FILE, or",
        ("--checkpoint", last, "--model", "densenet121"): "--model applies to --weights alone",
        ("--weights", "DEFAULT"): "--weights needs --model",
        ("--checkpoint", str(tmp_path / "none.pt")): "no checkpoint",
    }
    two = write_folder(tmp_path / "two")
    wrong["--checkpoint", last, "--data-path", str(two)] = "has 2 classes, the network 3"
    for flags, said in wrong.items():
        assert main(["evaluate", *flags]) == 2
        assert said in capsys.readouterr().err


def test_other_classes_of_the_same_number(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    other = write_folder(tmp_path / "other", ("ant", "dog", "eel"))
    flags = ("--checkpoint", str(trained / "last.pt"), "--data-path", str(other))
    assert main(["evaluate", *flags]) == 2
    assert "'ant' where it has 'cat'" in capsys.readouterr().err


def test_predict_files_and_folders(images: Path, trained: Path, capsys: Captured) -> None:
    files = sorted((images / "val").rglob("*.png"))
    flags = ("--checkpoint", str(trained / "best.pt"), "--batch-size", "4")
    assert main(["predict", str(images / "val"), *flags, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in found] == [str(file) for file in files]
    expected = _probabilities(trained, files)
    if content(trained, "best.pt")["epoch"] == content(trained)["epoch"]:
        for row, shares in zip(found, expected, strict=True):
            order = shares.argsort(descending=True).tolist()
            assert [p["index"] for p in row["predictions"]] == order
            assert [p["class"] for p in row["predictions"]] == [
                ("cat", "dog", "eel")[i] for i in order
            ]
            given = [p["probability"] for p in row["predictions"]]
            assert given == pytest.approx(shares[order].tolist(), abs=1e-5)
    assert main(["predict", str(files[0]), *flags, "--top", "1"]) == 0
    text = capsys.readouterr().out
    best = found[0]["predictions"][0]
    assert text == f"{files[0]}: {best['class']} {100 * best['probability']:.2f} %\n"


def _pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_predict_from_a_pipe(
    images: Path, trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image's bytes, or paths line by line: the same answer."""
    flags = ("--checkpoint", str(trained / "last.pt"), "--json")
    file = images / "val" / "dog" / "1.png"
    answers = []
    for data in (None, file.read_bytes(), f"{file}\n\n".encode()):
        if data is not None:
            _pipe(monkeypatch, data)
        assert main(["predict", str(file) if data is None else "-", *flags]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [answer["image"] for answer in answers] == [str(file), "-", str(file)]
    assert answers[0]["predictions"] == answers[1]["predictions"] == answers[2]["predictions"]

    for data, said in (
        (b"", "nothing on standard input"),
        (b"\xff\xfe\x00\x01" * 9, "neither an image"),
        (file.read_bytes()[:-500], "corrupt image -"),
        (b"/nowhere/a.png\n", "/nowhere/a.png: no such file"),
    ):
        _pipe(monkeypatch, data)
        assert main(["predict", "-", *flags]) == 2
        assert said in capsys.readouterr().err


def test_predict_corrupt_images(
    images: Path, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(images / "val" / "cat", tmp_path / "some")
    (tmp_path / "some" / "1.png").write_text("no image")
    flags = (str(tmp_path / "some"), "--checkpoint", str(trained / "last.pt"))
    assert main(["predict", *flags]) == 2
    said = capsys.readouterr()
    assert f"corrupt image {tmp_path / 'some' / '1.png'}" in said.err and not said.out
    assert main(["predict", *flags, "--on-corrupt", "skip"]) == 0
    said = capsys.readouterr()
    assert "1 corrupt images left out" in said.err and len(said.out.splitlines()) == 2
    (tmp_path / "bare").mkdir()
    assert main(["predict", str(tmp_path / "bare"), *flags[1:]]) == 2
    assert "no images in this folder" in capsys.readouterr().err


def test_gray_images_are_predicted_by_gray_networks(tmp_path: Path, capsys: Captured) -> None:
    data, output = write_idx(tmp_path / "data"), tmp_path / "out"
    assert train(data, output, "--epochs", "1") == 0
    Image.new("RGB", (50, 30), (9, 99, 200)).save(tmp_path / "any.png")
    capsys.readouterr()
    image, last = str(tmp_path / "any.png"), str(output / "last.pt")
    assert main(["predict", image, "--checkpoint", last, "--val-resize-size", "28"]) == 0
    assert capsys.readouterr().out.count("%") == 5


def test_imagenet_by_name(images: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with weights by name answers in ImageNet's categories."""
    given: list[Any] = []

    def densenet121(weights: str | None = None, **named: Any) -> densenet_fast.EfficientDenseNet:
        given.append(weights)
        if weights != "IMAGENET1K_V1":
            raise ValueError(f"no weights {weights}")
        torch.manual_seed(0)
        return densenet_fast.EfficientDenseNet(2, (1, 1), 4, num_classes=1000)

    monkeypatch.setattr(densenet_fast, "densenet121", densenet121)
    file = str(images / "val" / "cat" / "0.png")
    flags = ("--model", "densenet121", "--weights")
    assert main(["predict", file, *flags, "IMAGENET1K_V1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    from torchvision.models import DenseNet121_Weights

    names = DenseNet121_Weights.IMAGENET1K_V1.meta["categories"]
    assert [row["class"] for row in found] == [names[row["index"]] for row in found]
    assert given == ["IMAGENET1K_V1"]
    assert main(["predict", file, *flags, "IMAGENET9"]) == 2
    assert "no weights IMAGENET9" in capsys.readouterr().err
    assert main(["evaluate", *flags, "IMAGENET1K_V1", "--data-path", str(images)]) == 2
    assert "has 3 classes, the network 1000" in capsys.readouterr().err


def test_table_and_events(trained: Path) -> None:
    with open(trained / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*row_of(MULTICLASS, averaged=True), *MACHINE_ROW]
    history = content(trained)["history"]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for row, kept in zip(rows, history, strict=True):
        numbers = {name: float(value) for name, value in row.items()}
        assert {name: numbers[name] for name in kept} == pytest.approx(kept)
        assert numbers.keys() - kept.keys() == set(TIMED)
        assert numbers["images_per_second"] > 0 and numbers["peak_memory_mib"] > 10

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    losses = events.Scalars("epoch/train_loss")
    assert [event.value for event in losses] == pytest.approx([r["train_loss"] for r in history])
    assert [event.step for event in losses] == [3, 6]  # nine images, four at a time
    assert [event.step for event in events.Scalars("step/loss")] == [3, 6]


def test_resumed_run_leaves_no_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was logged behind the checkpoint is not there any more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Event files of one second are read in the order of the numbers in their names, as text: those
    # of runs in one process, where there is a tenth, in another one.
    counter = type(event_file_writer._global_uid)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter(0))
    data, output = write_idx(tmp_path / "data"), tmp_path / "out"
    assert train(data, output, "--epochs", "1", "--print-freq", "1") == 0
    shutil.copy(output / "last.pt", tmp_path / "early.pt")
    more = ("--epochs", "3", "--print-freq", "1")
    assert train(data, output, *more, "--resume", "auto", "--steps", "9") == 0
    assert train(data, output, *more, "--resume", str(tmp_path / "early.pt")) == 0
    rows = list(csv.DictReader((output / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(row[name] for row in rows for name in TIMED)  # the first one's was in the table
    elsewhere = tmp_path / "elsewhere"
    assert train(data, elsewhere, *more, "--resume", str(tmp_path / "early.pt")) == 0
    rows = list(csv.DictReader((elsewhere / "log.csv").read_text().splitlines()))
    assert [bool(row["seconds"]) for row in rows] == [False, True, True]
    events = EventAccumulator(str(output / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 19))
    assert -(-TRAIN // 4) * 3 == 18


def test_digits_need_no_files(tmp_path: Path, capsys: Captured) -> None:
    """The default data, embedded in scikit-learn, in a few steps."""
    pytest.importorskip("sklearn")
    flags = (*TINY, "--output-dir", str(tmp_path), "--batch-size", "64", "--steps", "3")
    assert main(["train", *flags, "--epochs", "1"]) == 0
    found = content(tmp_path)
    assert found["classes"] == [str(n) for n in range(10)]
    assert (found["data"]["train"], found["data"]["val"]) == (1437, 360)
    assert found["architecture"]["in_channels"] == 1
    assert "stopped after --steps 3" in capsys.readouterr().out


def test_fine_tuning_example(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small network in DenseNet-121's place; the weights' classifier is not used."""
    data = write_folder(tmp_path / "images")
    torch.manual_seed(0)
    made = []

    def small(weights: str | None = None, **_: Any) -> densenet_fast.EfficientDenseNet:
        assert weights is None
        made.append(densenet_fast.EfficientDenseNet(4, (2, 2), 8))
        return made[-1]

    torch.save(small().state_dict(), tmp_path / "weights.pth")

    def load_weights(model: nn.Module, path: str, **_: Any) -> None:
        model.load_state_dict(torch.load(path, weights_only=True))

    monkeypatch.setattr(densenet_fast, "densenet121", small)
    monkeypatch.setattr(densenet_fast, "load_weights", load_weights)
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / "fine_tune.py"
    monkeypatch.setattr(sys, "argv", [str(example), str(data), "weights.pth", "2"])
    runpy.run_path(str(example))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["0 train", "0 val", "1 train", "1 val"]
    tuned = torch.load("fine_tuned.pt", weights_only=True)
    assert tuned["classifier.weight"].shape[0] == 2
    start = torch.load("weights.pth", weights_only=True)["features.conv0.weight"]
    moved = (tuned["features.conv0.weight"] - start).abs().max()
    assert 0 < moved < 0.01
