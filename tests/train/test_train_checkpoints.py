"""Checkpoints: altered ones are refused by every command, and one seed writes one file."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from PIL import Image
from training_runs import content, train, write_idx

from densenet_fast.train import checkpoints, entries
from densenet_fast.train.command import main

Captured = pytest.CaptureFixture[str]
WEIGHT = "features.conv0.weight"
FLAGS = ("--opt", "adamw", "--model-ema", "--epochs", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps into the second epoch, with averaged weights."""
    output = tmp_path_factory.mktemp("trained")
    assert train(folder, output, *FLAGS, "--steps", "8") == 0
    return output


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "one.png"
    Image.new("L", (28, 28), 99).save(path)
    return path


def altered(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy in which what is at `path` is another value; without it, where `new` is a KeyError."""
    if not path:
        return new(value) if callable(new) else new
    key, *rest = path
    if isinstance(value, (list, tuple)):
        parts = [
            altered(part, tuple(rest), new) if at == key else part for at, part in enumerate(value)
        ]
        return type(value)(parts)
    if new is KeyError and not rest:
        return {name: part for name, part in value.items() if name != key}
    return {**value, key: altered(value[key], tuple(rest), new)}


whole = functools.cache(content)


def write(trained: Path, file: Path, path: tuple[Any, ...], new: Any) -> None:
    torch.save(altered(whole(trained), path, new), file)


def commands(folder: Path, file: Path, image: Path) -> dict[str, Callable[[], int]]:
    """Everything that reads a checkpoint, by name."""
    out, checkpoint = file.parent / "out", ("--checkpoint", str(file))
    return {
        "resume": lambda: train(folder, out, *FLAGS, "--resume", str(file)),
        "test": lambda: train(folder, out, "--test-only", "--resume", str(file)),
        "weights": lambda: train(folder, out, "--steps", "1", "--weights", str(file)),
        "evaluate": lambda: main(["evaluate", *checkpoint, "--data-path", str(folder)]),
        "predict": lambda: main(["predict", *checkpoint, str(image)]),
    }


WRONG = [
    (("architecture",), None, "architecture: expected a dictionary with model, num_classes"),
    (("architecture", "model"), "resnet50", "one of densenet121"),
    (("architecture", "model"), "densenet121", "depth is of densenet-bc alone"),
    (("architecture", "depth"), "10", "expected a whole number from 1 to 10000, got '10' (str)"),
    (("architecture", "depth"), 11, "--depth must be 6n + 4"),
    (("architecture", "depth"), None, "depth is of densenet-bc alone"),
    (("architecture", "growth_rate"), 10**9, "architecture['growth_rate']: expected a whole"),
    (("architecture", "growth_rate"), KeyError, "expected a dictionary with model"),
    (("architecture", "num_classes"), True, "got True (bool)"),
    (("architecture", "drop_rate"), float("nan"), "expected a number from 0 to 1, got nan"),
    (("arguments",), [], "arguments: expected a dictionary"),
    (("arguments", "lr"), [0.1], "arguments['lr']: expected a number, text or None"),
    (("at",), -1, "at: expected a whole number from 0"),
    (("by_process",), {}, "by_process: expected a list"),
    (("by_process", 0, "cuda_rng"), 3, "by_process[0]['cuda_rng']: expected a dense tensor"),
    (("by_process", 0, "meters", "loss"), [], "by_process[0]['meters']['loss']: expected a dict"),
    (("by_process", 0, "python_rng"), (), "expected a state of Python's generator"),
    (("by_process", 0, "rng"), torch.zeros(3), "expected a state of PyTorch's generator"),
    (("classes",), "abcdefghij", "classes: expected a list of at least 1"),
    (("classes", 3), 3, "classes[3]: expected text, got 3 (int)"),
    (("classes",), ["a", "b"], "classes: expected 10 names"),
    (("data",), None, "data: expected a dictionary with train, val"),
    (("data", "train"), "22", "data['train']: expected a whole number"),
    (("ema",), 1, "ema: expected a dictionary"),
    (("ema", WEIGHT), KeyError, f"ema: {WEIGHT} is missing"),
    (("ema_updates",), -1, "ema_updates: expected a whole number"),
    (("epoch",), 1.0, "epoch: expected a whole number from 0 to 9223372036854775807, got 1.0"),
    (("epoch",), 2**70, "epoch: expected a whole number"),
    (("history",), 1, "history: expected a list"),
    (("history", 0, "val_top1"), "9", "history[0]['val_top1']: expected a number, got '9'"),
    (("history", 0, "lr"), KeyError, "history[0]: expected a dictionary with epoch, lr"),
    (("model",), None, "model: expected a dictionary"),
    (("model", WEIGHT), lambda t: t[:, :, 1:], f"model['{WEIGHT}']: expected a tensor [4"),
    (("model", WEIGHT), torch.Tensor.double, "got a tensor [4, 1, 3, 3] of float64"),
    (("model", WEIGHT), lambda t: t.to("meta"), "expected a dense tensor"),
    (("optimizer",), [], "optimizer: expected a dictionary with state"),
    (("optimizer", "state"), {"a": {}}, "expected a dictionary with keys of type int"),
    (("optimizer", "param_groups"), [], "param_groups']: expected a list of at least 1"),
    (("preprocessing", "crop"), 0, "preprocessing['crop']: expected a whole number from 1"),
    (("preprocessing", "std"), (0.0,), "preprocessing['std'][0]: expected a number from 1e-30"),
    (("preprocessing", "mean"), (0.5, 0.5), "expected 1 values, one per channel"),
    (("task",), "segmentation", "task: expected one of multiclass, multilabel, got 'segm"),
    (("processes",), None, "processes: expected a whole number from 1"),
    (("scaler",), {"scale": 0.0}, "scaler['scale']: expected a number from 1e-30"),
    (("steps",), "8", "steps: expected a whole number"),
    (("threads",), 0, "threads: expected a whole number from 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "new", "said"),
    WRONG,
    ids=[f"{'/'.join(map(str, w[0]))}-{n}" for n, w in enumerate(WRONG)],
)
def test_entries_that_are_wrong(
    folder: Path,
    trained: Path,
    image: Path,
    tmp_path: Path,
    capsys: Captured,
    path: tuple[Any, ...],
    new: Any,
    said: str,
) -> None:
    """Every command refuses them, whether it uses them or not."""
    file = tmp_path / "altered.pt"
    write(trained, file, path, new)
    for name, act in commands(folder, file, image).items():
        assert act() == 2, name
        error = capsys.readouterr().err
        assert f"{file} is no whole checkpoint: " in error and said in error, name
        assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_a_weight(
    folder: Path, trained: Path, image: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "damaged.pt"
    write(trained, file, ("epoch",), 1)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(content(trained)["model"][WEIGHT].numpy().tobytes())] ^= 1
    file.write_bytes(damaged)
    for name, act in commands(folder, file, image).items():
        assert act() == 2, name
        assert re.search(r"the checksum of \S+ is wrong", capsys.readouterr().err), name


def test_every_entry_has_its_check(trained: Path) -> None:
    assert content(trained).keys() - {"format"} == entries.NEEDED.keys() | entries.TRAINING.keys()
    assert {path[0] for path, _, _ in WRONG} == content(trained).keys() - {"format"}


@pytest.mark.parametrize("name", [*entries.NEEDED, *entries.TRAINING])
def test_entries_that_are_missing(
    folder: Path, trained: Path, image: Path, tmp_path: Path, capsys: Captured, name: str
) -> None:
    """Without what training alone needs, a checkpoint is still good for everything else."""
    file = tmp_path / "altered.pt"
    write(trained, file, (name,), KeyError)
    for command, act in commands(folder, file, image).items():
        refused = name in entries.NEEDED or command == "resume"
        assert act() == (2 if refused else 0), command
        error = capsys.readouterr().err
        assert (f"has no {name}" in error) == refused, command


# What is right in itself, but cannot be of the run that is gone on with.
MISFITS = [
    (("at",), 7, "epoch 1, at 7 and steps 8 do not go together where an epoch has 6 steps"),
    (("steps",), 9, "epoch 1, at 2 and steps 9 do not go together"),
    (("history",), [], "history: expected a row for each of 1 epochs"),
    (("history", 0, "epoch"), 3, "history: expected a row for each of 1 epochs"),
    (("history", 0, "ema_val_top1"), KeyError, "history[0]: expected epoch, lr, "),
    (("ema",), None, "ema and ema_updates: expected both"),
    (("ema_updates",), None, "ema and ema_updates: expected both"),
    (
        ("scaler",),
        {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9,
         "_growth_tracker": 0},
        "scaler: expected {}",
    ),
    (("by_process",), lambda rows: rows * 2, "by_process: 2 before, 1 now"),
    (("by_process", 0, "cuda_rng"), torch.zeros(16), "cuda_rng does not fit a run on cpu"),
    (("by_process", 0, "meters"), {}, "meters: expected loss, top1"),
    (("by_process", 0, "meters", "top1", "tp"), lambda t: t[None], "['top1']['tp']: expected"),
    (("optimizer", "state", 0), {}, "optimizer[0]: exp_avg is missing"),
    (("optimizer", "state", 0, "exp_avg"), lambda t: t[1:], "optimizer[0]['exp_avg']: expected"),
    (("optimizer", "state", 0, "step"), torch.tensor(-1.0), "expected a step from 1 to 8, got -1"),
    (("optimizer", "state"), lambda state: {**state, 999: {}}, "states of other than"),
    (("optimizer", "param_groups", 0, "params"), [0], "expected 1 groups of"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "new", "said"),
    MISFITS,
    ids=[f"{'/'.join(map(str, m[0]))}-{n}" for n, m in enumerate(MISFITS)],
)
def test_entries_of_another_run(
    folder: Path,
    trained: Path,
    tmp_path: Path,
    capsys: Captured,
    path: tuple[Any, ...],
    new: Any,
    said: str,
) -> None:
    file = tmp_path / "altered.pt"
    write(trained, file, path, new)
    assert train(folder, tmp_path / "out", *FLAGS, "--resume", str(file)) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, -100, -1])
def test_files_that_are_cut(
    folder: Path, trained: Path, image: Path, tmp_path: Path, capsys: Captured, kept: int
) -> None:
    file = tmp_path / "cut.pt"
    file.write_bytes((trained / "last.pt").read_bytes()[:kept])
    for name, act in commands(folder, file, image).items():
        assert act() == 2, name
        error = capsys.readouterr().err
        assert str(file) in error and len(error.splitlines()) == 1, error


def test_validation_alone_asks_nothing_of_the_training(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    """Of how many processes the run was, and how its optimizer stood, does not matter there."""
    file = tmp_path / "two.pt"
    found = {
        **content(trained),
        "processes": 2,
        "by_process": [content(trained)["by_process"][0]] * 2,
    }
    torch.save(found, file)
    assert train(folder, tmp_path / "out", "--test-only", "--resume", str(file)) == 0


def test_lack_of_memory_is_no_damage(
    folder: Path, trained: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: 9 bytes")

    monkeypatch.setattr(torch, "load", load)
    flags = ("--data-path", str(folder))
    assert main(["evaluate", "--checkpoint", str(trained / "last.pt"), *flags]) == 1
    assert "not enough memory: 9 bytes. Try a smaller --batch-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        checkpoints.is_checkpoint(trained / "last.pt")


def test_one_seed_writes_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the generators and the clock were at before."""
    flags = ("--epochs", "2", "--steps", "9", "--auto-augment", "ra", "--drop-rate", "0.2")
    written, drawn = [], []
    for number in range(2):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        torch.manual_seed(number)
        where = tmp_path / str(number)
        where.mkdir()
        monkeypatch.chdir(where)
        assert train(folder, Path("out"), *flags, "--model-ema", "--seed", "5") == 0
        written.append({name: Path("out", name).read_bytes() for name in ("last.pt", "best.pt")})
        drawn.append((random.random(), np.random.random()))  # noqa: NPY002
    assert written[0] == written[1]
    assert drawn[0] == drawn[1]
    assert written[0]["last.pt"] != written[0]["best.pt"]
