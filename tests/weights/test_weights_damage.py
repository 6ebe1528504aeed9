"""Damaged files: what is not refused is what was saved."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from weight_files import ours, refused, saved, trained

from densenet_fast import load_weights
from densenet_fast.weights import checkpoint_files

STATE = {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2), "steps": torch.tensor(4)}
CONTENTS: dict[str, Any] = {
    "bare": STATE,
    "entry": {"state_dict": STATE, "path": Path("a"), "epoch": 3},
    "network": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_flipped_bits(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pth", CONTENTS[kind])
    whole, expected = path.read_bytes(), checkpoint_files.read(path)
    generator = torch.Generator().manual_seed(0)
    refusals = 0
    for bit in torch.randperm(8 * len(whole), generator=generator)[:1500].tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = checkpoint_files.read(path)
        except ValueError:
            refusals += 1
        else:
            assert (found.entry, list(found.values)) == (expected.entry, list(expected.values))
            for name, value in found.values.items():
                assert torch.equal(value, expected.values[name]), (bit, name)
    assert refusals > 500


def test_flipped_bit_of_a_weight(tmp_path: Path) -> None:
    state = trained(ours).state_dict()
    path = saved(tmp_path / "file.pth", state)
    content = bytearray(path.read_bytes())
    content[content.index(state["classifier.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    refused(path, ValueError, r"damaged \(BadZipFile: the checksum of file/data/\d+ is wrong\)")


@pytest.fixture
def without_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


@pytest.mark.usefixtures("without_checksums")
def test_files_without_checksums(tmp_path: Path) -> None:
    source, model = trained(ours), trained(ours, seed=1)
    load_weights(model, saved(tmp_path / "file.pth", source.state_dict()))
    assert torch.equal(model.classifier.weight, source.classifier.weight)


@pytest.mark.parametrize("beside", [3, Path("a")])
def test_packed_files(beside: Any, tmp_path: Path) -> None:
    """Packed again by another program, with or without compression."""
    source = trained(ours)
    path = saved(tmp_path / "file.pth", {"model": source.state_dict(), "beside": beside})
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "2.pth", "w") as packed:
            for part in whole.namelist():
                packed.writestr(part, whole.read(part), method)
        model = trained(ours, seed=1)
        load_weights(model, tmp_path / "2.pth")
        assert torch.equal(model.classifier.weight, source.classifier.weight)


@pytest.mark.parametrize("beside", [3, Path("a")])
def test_files_are_mapped_into_memory(
    beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not read into it: a file larger than memory may hold a small state dict."""
    path = saved(tmp_path / "file.pth", {"model": ours().state_dict(), "beside": beside})
    mapped: list[str] = []
    from_file = torch.UntypedStorage.from_file

    def record(name: str, *rest: Any) -> Any:
        mapped.append(name)
        return from_file(name, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", record)
    checkpoint_files.read(path)
    assert set(mapped) == {str(path)}
