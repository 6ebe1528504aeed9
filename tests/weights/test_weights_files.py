"""Files that are read, and those that are refused: nothing in the model changes then."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from comparison import assert_close
from library_networks import images, monai_network
from torch import nn
from weight_files import ours, refused, saved, trained

from densenet_fast import load_weights


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(zipped: bool, tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    path = tmp_path / "file.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
    load_weights(model, str(path))
    path.unlink()
    assert_close(model(images()), source(images()), "output")


@pytest.mark.parametrize("name", ["file.safetensors", "file.bin"])
def test_safetensors(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = trained(monai_network), trained(ours, seed=1)
    safetensors.save_file(source.state_dict(), tmp_path / name)
    report = load_weights(model, tmp_path / name)
    assert report.layout == "MONAI"
    assert_close(model(images()), source(images()), "output")


def test_safetensors_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(path, ImportError, r"needs safetensors: pip install 'densenet_fast\[weights\]'")


def test_damaged_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"no such format")
    refused(path, ValueError, "called .safetensors, but its content is not")
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refused(path, ValueError, "damaged or no file of safetensors")
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(path, ValueError, "holds no state dict; it has no entries")


def test_paths(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", FileNotFoundError, "there is no file .*none.pth")
    refused(tmp_path, IsADirectoryError, "is a directory, expected a checkpoint file")
    refused(3, TypeError, "path must be a path of a file, got 3")
    refused(b"file.pth", TypeError, "path must be a path of a file")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"\0" * 100, pickle.dumps({"a": 1}), b"PK\x03\x04 no zip"]
)
def test_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    error = refused(path, ValueError, "is not a checkpoint of torch.save, or damaged")
    assert error.__cause__ is not None


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(ours().state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (len(whole) - 50, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        refused(path, ValueError, "is not a checkpoint of torch.save, or damaged")


def test_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    refused(path, ValueError, "is not a checkpoint of torch.save, or damaged")


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    refused(path, ValueError, "is a TorchScript archive")


def test_contents_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    refused(saved(path, {}), ValueError, "holds no state dict; it has no entries")
    refused(saved(path, {"state_dict": {}}), ValueError, "has 'state_dict' \\(an empty dict\\)")
    refused(saved(path, torch.ones(3)), ValueError, "holds a Tensor, expected a state dict")
    refused(saved(path, [1, 2]), ValueError, "holds a list, expected a state dict")
    refused(saved(path, {"epoch": 3}), ValueError, r"it has 'epoch' \(a int\)")
    refused(saved(path, {1: torch.ones(2, 2)}), ValueError, r"1 \(a tensor \[2, 2\]\)")


def test_arguments(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", ours().double().state_dict())
    refused(path, TypeError, "ignore must be a pattern or a sequence", ignore=3)
    refused(path, TypeError, "ignore must be a pattern or a sequence", ignore=("a", 3))
    refused(path, TypeError, "prefix must be a string or None, got 3", prefix=3)
    refused(path, TypeError, "entry must be a string or None, got 3", entry=3)
    refused(path, TypeError, "cast must be True or False, got 1", cast=1)
    refused(path, ValueError, r"'clasifier\.\*' matches no tensor", ignore="clasifier.*")
    with pytest.raises(TypeError, match="expects a module, got dict"):
        load_weights({}, path)  # type: ignore[arg-type]


def test_models_without_values(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", ours().state_dict())
    with torch.device("meta"):
        model = ours()
    with pytest.raises(ValueError, match=r"features\.conv0\.weight.*model\.to_empty"):
        load_weights(model, path)
    assert len(load_weights(model.to_empty(device="cpu"), path)) == len(model.state_dict())
    with pytest.raises(ValueError, match="a lazy one its first input"):
        load_weights(nn.Sequential(nn.LazyLinear(3)), path)
