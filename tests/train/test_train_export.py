"""A trained network outside of the command: `load` in Python, and `densenet-fast export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from training_runs import content, train, write_folder

import densenet_fast
from densenet_fast.train import load
from densenet_fast.train.architecture import Architecture
from densenet_fast.train.command import main

Captured = pytest.CaptureFixture[str]
SIZE = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = write_folder(tmp_path_factory.mktemp("images") / "images", ("cat", "dog", "eel"))
    output = tmp_path_factory.mktemp("trained")
    sizes = ("--train-crop-size", "24", "--val-resize-size", "28", "--val-crop-size", str(SIZE))
    ema = ("--model-ema", "--model-ema-decay", "0.5", "--model-ema-steps", "1")
    assert train(images, output, "--epochs", "1", "--workers", "0", *sizes, *ema) == 0
    return output / "last.pt"


def inputs(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("ema", [True, False])
def test_load(trained: Path, ema: bool) -> None:
    found = content(trained.parent)
    expected = Architecture(**found["architecture"]).build().eval()
    expected.load_state_dict(found["ema" if ema else "model"])
    model, classes, preprocessing, task = load(str(trained), ema=ema)
    assert not model.training
    assert torch.equal(model(inputs(2)), expected(inputs(2)))
    assert classes == ("cat", "dog", "eel") and task == "multiclass"
    assert preprocessing == found["preprocessing"]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.pt"):
        load(tmp_path / "none.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no checkpoint of densenet-fast train"):
        load(tmp_path / "other.pt")


def test_a_program(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "network.pt2"
    arguments = ["export", "--checkpoint", str(trained), "--output", str(output)]
    assert main(arguments) == 0
    assert f"images [N, 3, {SIZE}, {SIZE}] to logits [N, 3]" in capsys.readouterr().out
    extra = {"densenet_fast": ""}
    program = torch.export.load(output, extra_files=extra)
    facts = json.loads(extra["densenet_fast"])
    assert facts["classes"] == ["cat", "dog", "eel"]
    assert facts["preprocessing"]["crop"] == SIZE
    model = load(trained).model
    for count in (1, 2, 5):
        torch.testing.assert_close(program.module()(inputs(count)), model(inputs(count)))
    before = output.read_bytes()
    assert main(arguments) == 2
    assert "is there already: --overwrite replaces it" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main([*arguments, "--no-ema", "--overwrite"]) == 0
    program = torch.export.load(output)
    torch.testing.assert_close(program.module()(inputs(2)), load(trained, ema=False)[0](inputs(2)))


def test_onnx(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    output = tmp_path / "network.onnx"
    size = ("--val-resize-size", "36", "--val-crop-size", "32")
    assert main(["export", "--checkpoint", str(trained), "-o", str(output), *size]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    session = runtime.InferenceSession(output)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["densenet_fast"])
    assert facts["classes"] == ["cat", "dog", "eel"]
    assert (facts["preprocessing"]["resize"], facts["preprocessing"]["crop"]) == (36, 32)
    for count in (1, 3):
        images = torch.randn(count, 3, 32, 32)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        expected = load(trained).model(images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "network.pb"], "expected a name that ends in .onnx or .pt2"),
        (["--output", "folder/network.pt2"], "there is no folder folder"),
    ],
)
def test_refused(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--checkpoint", str(trained), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"densenet-fast {densenet_fast.__version__}\n"
