"""Short trainings for the tests of `densenet-fast`: small images, tiny networks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from densenet_fast.train import idx
from densenet_fast.train.command import main

TRAIN, VAL = 22, 10  # images: five batches of four and a rest of two
TINY = ("--model", "densenet-bc", "--depth", "10", "--growth-rate", "2")


def write_idx(folder: Path) -> Path:
    """A folder of IDX files: blobs whose place tells their class."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for count, (images, labels) in ((TRAIN, idx.TRAIN), (VAL, idx.TEST)):
        classes = np.arange(count) % 10
        pixels = generator.integers(0, 60, (count, 28, 28))
        for image, label in zip(pixels, classes, strict=True):
            image[2 * label : 2 * label + 8, 4:24] += 190
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        (folder / images).write_bytes(header + pixels.astype(np.uint8).tobytes())
        header = struct.pack(">BBBBI", 0, 0, 8, 1, count)
        (folder / labels).write_bytes(header + classes.astype(np.uint8).tobytes())
    return folder


def write_folder(
    folder: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 3, size: int = 40
) -> Path:
    """A folder with train/ and val/: one colour per class, and noise."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for at, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = generator.integers(0, 80, (size, size + 4, 3))
                pixels[:, :, at % 3] += 150
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / part / name / f"{n}.png")
    return folder


def train(folder: Path, output: Path, *flags: str, batch_size: int = 4) -> int:
    """`densenet-fast train` in this process; its exit status."""
    common = ("--data-path", str(folder), "--output-dir", str(output), "--lr", "0.05")
    return main(["train", *TINY, *common, "--batch-size", str(batch_size), *flags])


def content(output: Path, name: str = "last.pt") -> dict[str, Any]:
    """A checkpoint."""
    return torch.load(output / name, weights_only=True)


# What the table says of the machine, which no checkpoint has.
TIMED = ("seconds", "images_per_second", "peak_memory_mib")


def comparable(output: Path) -> dict[str, Any]:
    """What two runs that are the same training must have in common, bit for bit."""
    found = content(output)
    names = ("history", "model", "ema", "optimizer", "scaler", "epoch", "at", "steps")
    own = [{k: v for k, v in part.items() if k != "meters"} for part in found["by_process"]]
    return {"own": own, **{name: found[name] for name in names}}


def assert_same(first: Any, second: Any, path: str = "") -> None:
    """Bitwise equality of nested data."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{path}/{at}")
    else:
        assert first == second, path
