"""Image files as `densenet-fast` reads them: 16 bits, orientation, what is no image, names."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder
from training_runs import content, train, write_folder

from densenet_fast.train.command import main
from densenet_fast.train.errors import DataError
from densenet_fast.train.images import find_images, read_image
from densenet_fast.train.transforms import Preprocessing

Captured = pytest.CaptureFixture[str]
WHOLE = ("--val-resize-size", "40")  # pixels of the images' shorter edge
SIZES = ("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32")
ORIENTATION = 0x112  # EXIF's tag
LATIN = os.fsdecode(b"caf\xe9")  # no UTF-8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of cats and dogs."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_folder(folder / "images")
    assert train(images, folder, "--epochs", "1", "--workers", "0", *SIZES) == 0
    return folder / "last.pt"


def ramp(dtype: Any, most: int = 65535) -> np.ndarray[Any, Any]:
    return np.linspace(0, most, 256).round().reshape(16, 16).astype(dtype)


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


SIXTEEN: dict[str, Callable[[], io.BytesIO]] = {
    "PNG": lambda: saved(Image.fromarray(ramp(np.uint16)), "PNG"),
    "TIFF": lambda: saved(Image.fromarray(ramp(np.uint16)), "TIFF"),
    "TIFF, big-endian": lambda: saved(
        Image.frombytes("I;16B", (16, 16), ramp(">u2").tobytes()), "TIFF"
    ),
    "TIFF, 32 bits": lambda: saved(Image.fromarray(ramp(np.int32)), "TIFF"),
    "PGM": lambda: saved(Image.fromarray(ramp(np.uint16)), "PPM"),
    "PGM of 12 bits": lambda: io.BytesIO(b"P5 16 16 4095\n" + ramp(">u2", 4095).tobytes()),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_16_bits_are_read_in_their_whole_depth(kind: str) -> None:
    """Every level stays, dark images dark: the scale is the file's kind, not its values."""
    found = read_image(SIXTEEN[kind](), "RGB")
    assert found.shape == (1, 16, 16)
    rounded = 0.5 / 4095 if "12" in kind else 0  # from 12 bits
    expected = ramp(np.float32) / np.float32(65535)
    np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=0, atol=rounded)
    dark = saved(Image.fromarray(np.arange(4, dtype=np.uint16).reshape(2, 2)), "PNG")
    for channels in (1, 3):
        plain = Preprocessing(None, 2, (0.0,) * channels, (1.0,) * channels)
        dark.seek(0)
        pixels = plain.transform()(read_image(dark, "L"))
        levels = torch.arange(4.0).reshape(1, 2, 2).expand(channels, 2, 2) / 65535
        torch.testing.assert_close(pixels, levels, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (ramp(np.float32, 1), "mode F"),
        (ramp(np.int32, 65536), "mode I: expected pixels from 0 to 65535, found 0 to 65536"),
        (ramp(np.int32) - 1, "mode I: expected pixels from 0 to 65535, found -1 to 65534"),
    ],
    ids=["F", "above", "below"],
)
def test_pixels_without_a_known_white(
    trained: Path, tmp_path: Path, capsys: Captured, pixels: np.ndarray[Any, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        read_image(saved(Image.fromarray(pixels), "TIFF"), "RGB")
    images = write_folder(tmp_path / "images")
    wrong = images / "val" / "dog" / "1.tif"
    Image.fromarray(pixels).save(wrong)
    checkpoint = ("--checkpoint", str(trained))
    for act in (
        lambda: train(images, tmp_path / "out", *SIZES),
        lambda: main(["evaluate", *checkpoint, "--data-path", str(images)]),
        lambda: main(["predict", *checkpoint, str(wrong)]),
    ):
        assert act() == 2
        assert f"{wrong} ({said}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pil_does(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    file = saved(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG", **options)
    expected = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    np.testing.assert_array_equal(np.asarray(read_image(file, "RGB")), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation(orientation: int, kind: str) -> None:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(10, 6) * 4)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = saved(image, kind, exif=exif)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        expected = ImageOps.exif_transpose(opened)
    found = read_image(file, "L")
    assert found.size == ((10, 6) if orientation > 4 else (6, 10)) == expected.size
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_orientation_of_16_bits() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = read_image(saved(Image.fromarray(ramp(np.uint16)), "PNG", exif=exif), "L")
    expected = np.rot90(ramp(np.float32), -1) / np.float32(65535)
    np.testing.assert_array_equal(np.asarray(found)[0], expected)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0", b"Exif\0\0" + struct.pack("<HHIH", 9, 9, 9, 9)])
def test_damaged_exif_data_have_no_orientation(exif: bytes) -> None:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(10, 6))
    np.testing.assert_array_equal(
        np.asarray(read_image(saved(image, "PNG", exif=exif), "L")), np.asarray(image)
    )


def lying(file: Path) -> None:
    """The same gray picture, of 16 bits and lying down, with an orientation that rights it."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(file) as image:
        pixels = np.asarray(image).astype(np.uint16) * 257
    Image.fromarray(np.rot90(pixels)).save(file, exif=exif)


def test_all_commands_read_images_alike(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    """The same answers for pictures with 8 bits upright, and with 16 bits lying down."""
    answers: list[Any] = []
    checkpoint = ("--checkpoint", str(trained))
    for name in ("plain", "lying"):
        images, output = write_folder(tmp_path / name), tmp_path / f"{name}-out"
        for file in images.rglob("*.png"):
            with Image.open(file) as image:
                image.convert("L").save(file)
            if name == "lying":
                lying(file)
        # Without resizing, which rounds 8 bits to 8 bits.
        flags = ("--epochs", "1", "--workers", "0", "--no-aug")
        assert train(images, output, *flags, *SIZES, *WHOLE) == 0
        capsys.readouterr()
        assert main(["evaluate", *checkpoint, *WHOLE, "--data-path", str(images), "--json"]) == 0
        assert main(["predict", *checkpoint, *WHOLE, str(images / "val"), "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        rows = [content(output)["history"][0], lines[0]]
        predicted = [p for line in lines[1:] for p in line["predictions"]]
        answers.append([row[n] for row in rows for n in ("val_loss", "loss") if n in row])
        answers[-1] += [p["probability"] for p in predicted]
    assert answers[0] == pytest.approx(answers[1], rel=1e-5)


def test_images_are_found_in_imagefolders_order(tmp_path: Path) -> None:
    folder = tmp_path / "of classes"
    for name in ("a/b/1.png", "a/b-c/2.JPG", "a/10.png", "a/9.png", "b/x.tif", "b/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "b" / "link").symlink_to(folder / "a")
    expected = [path for path, _ in ImageFolder(str(folder)).samples]
    found = [path for name in ("a", "b") for path in find_images(folder / name).files]
    assert found == expected and len(found) == 9


def clutter(images: Path) -> int:
    """What file systems, notebooks and archives leave beside images; how many entries."""
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (images / part / name).mkdir()
            (images / part / name / "0.png").write_text("no image")
        inside = images / part / "cat"
        (inside / "@eaDir").mkdir()
        (inside / "@eaDir" / "0.png").write_text("no image")
        (inside / "._0.png").write_text("no image")
        os.mkfifo(inside / "pipe.png")
        (inside / "zero.jpg").symlink_to("/dev/zero")
        (inside / "link.png").symlink_to(images / part / "dog" / "0.png")  # an image
    return 2 * 7


def test_hidden_and_special_files_are_left_out(
    trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    images = write_folder(tmp_path / "images")
    count = clutter(images)
    said = f"{images}: {count} hidden files and folders, or no regular files, left out\n"
    for flags in ((), ("--no-image-check",)):
        output = tmp_path / f"out{len(flags)}"
        assert train(images, output, "--epochs", "1", "--workers", "0", *SIZES, *flags) == 0
        assert capsys.readouterr().out.count(said) == 1
        found = content(output)
        assert found["classes"] == ["cat", "dog"]
        assert (found["data"]["train"], found["data"]["val"]) == (7, 7)

    flags = ("--checkpoint", str(trained))
    assert main(["evaluate", *flags, "--data-path", str(images), "--json"]) == 0
    written = capsys.readouterr()
    assert json.loads(written.out)["images"] == 7
    assert "7 hidden files and folders, or" in written.err
    assert main(["predict", *flags, str(images / "val"), str(images / "train" / "cat")]) == 0
    written = capsys.readouterr()
    assert len(written.out.splitlines()) == 7 + 4
    assert written.err == "11 hidden files and folders, or no regular files, left out\n"
    hidden = images / "val" / ".one.png"
    Image.new("RGB", (40, 40)).save(hidden)
    assert main(["predict", *flags, str(hidden)]) == 0  # it is asked for by its name


def test_pipes_sockets_and_devices_in_an_images_place(
    trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    """An error at once, where reading would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.png"))
        for name in (tmp_path / "pipe.png", tmp_path / "socket.png", Path("/dev/zero")):
            assert main(["predict", "--checkpoint", str(trained), str(name)]) == 2
            assert f"{name}: expected a regular file or a folder" in capsys.readouterr().err
            assert main(["predict", "--checkpoint", str(name), "any.png"]) == 2
            assert f"{name} is no checkpoint: expected a regular" in capsys.readouterr().err


def test_link_to_an_image_that_is_not_there(tmp_path: Path, capsys: Captured) -> None:
    """It stands for an image: an error, or left out where that is asked for, and counted."""
    images = write_folder(tmp_path / "images")
    lost = images / "train" / "cat" / "lost.png"
    lost.symlink_to(tmp_path / "nowhere.png")
    assert train(images, tmp_path / "out", *SIZES) == 2
    assert f"corrupt image {lost} (FileNotFoundError" in capsys.readouterr().err
    flags = ("--on-corrupt", "skip", "--epochs", "1", "--workers", "0")
    assert train(images, tmp_path / "out", *SIZES, *flags) == 0
    assert "1 corrupt images left out" in capsys.readouterr().out


def test_names_that_are_no_utf_8(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In output and JSON, each of their bytes that is none is written \\udcXX."""
    try:
        images = write_folder(tmp_path / LATIN, ("cat", LATIN))
    except OSError:
        pytest.skip("this file system has no such names")
    assert train(images, tmp_path / LATIN / "out", *SIZES) == 2
    assert "TensorBoard needs a name in UTF-8" in capsys.readouterr().err
    output = tmp_path / "out"
    assert train(images, output, "--epochs", "1", "--workers", "1", *SIZES) == 0
    assert content(output)["classes"] == [LATIN, "cat"]
    flags = ("--checkpoint", str(output / "last.pt"))
    assert train(images, output, "--epochs", "2", "--resume", "auto", "--workers", "0", *SIZES) == 0
    assert main(["evaluate", *flags, "--data-path", str(images)]) == 0
    file = images / "val" / LATIN / "0.png"
    capsys.readouterr()
    assert main(["predict", *flags, str(file)]) == 0
    assert "val/caf\\udce9/0.png: " in capsys.readouterr().out
    data = SimpleNamespace(buffer=io.BytesIO(os.fsencode(file) + b"\n"))
    monkeypatch.setattr(sys, "stdin", data)
    assert main(["predict", *flags, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == str(file)
    assert {row["class"] for row in found["predictions"]} == {"cat", LATIN}
    file.write_text("no image")
    assert main(["predict", *flags, str(file)]) == 2
    assert "caf\\udce9/0.png (UnidentifiedImageError" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_paths_longer_than_the_system_has(trained: Path, capsys: Captured, command: str) -> None:
    path = "a" * 300
    checkpoint = ["--checkpoint", str(trained)]
    flags = {
        "train": ["--data-path", path],
        "evaluate": ["--data-path", path, *checkpoint],
        "predict": [path, *checkpoint],
    }[command]
    assert main([command, *flags]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error and len(error.splitlines()) == 1


def test_image_that_changes_after_it_was_checked(
    trained: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from densenet_fast.train import predict

    file = tmp_path / "one.png"
    file.write_text("no image")
    monkeypatch.setattr(predict, "decoding_error", lambda _: None)
    assert main(["predict", "--checkpoint", str(trained), str(file)]) == 2
    assert f"error: {file} cannot be read: UnidentifiedImageError" in capsys.readouterr().err


def test_folder_that_cannot_be_read(
    trained: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are not left out without a word."""
    images = write_folder(tmp_path / "images")
    closed = images / "val" / "dog"
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    checkpoint = ("--checkpoint", str(trained))
    for flags in (
        ("train", "--data-path", str(images)),
        ("evaluate", *checkpoint, "--data-path", str(images)),
        ("predict", *checkpoint, str(images / "val")),
    ):
        assert main([*flags]) == 2
        error = capsys.readouterr().err
        assert "Permission denied" in error and str(closed) in error
