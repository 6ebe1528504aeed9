"""Quality: IDX files are read or refused, and accuracies are compared by the noise of seeds."""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, fashion_mnist, measure, memory, train
from benchmarks.datasets import DataError
from benchmarks.environment import describe
from benchmarks.suites import Options, quality, quality_page

MIB = 2**20
TRAIN_IMAGES, TRAIN_LABELS = fashion_mnist.TRAIN
TEST_IMAGES, TEST_LABELS = fashion_mnist.TEST


def idx(array: Any, magic: int | None = None) -> bytes:
    """An array as an IDX file, by default with the magic number of its dimensions."""
    head = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 12 training and 5 test images."""
    generator = np.random.default_rng(0)
    path = tmp_path / "data"
    path.mkdir()
    for count, (images, labels) in ((12, fashion_mnist.TRAIN), (5, fashion_mnist.TEST)):
        pixels = generator.integers(0, 256, (count, 28, 28), np.uint8)
        (path / images).write_bytes(idx(pixels))
        (path / labels).write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return path


def test_images_are_padded_and_normalised(folder: Path) -> None:
    data = fashion_mnist.load(folder)
    assert data.train_images.shape == (12, 1, 32, 32)
    assert data.test_images.shape == (5, 1, 32, 32)
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert data.test_labels.dtype == torch.int64
    std, mean = torch.std_mean(data.train_images)
    assert abs(mean) < 1e-5 and abs(std - 1) < 1e-5
    background = data.train_images[0, 0, 0, 0]
    assert (data.train_images[..., :2] == background).all()
    assert (data.test_images[..., 30:, :] == background).all()
    raw = torch.from_numpy(fashion_mnist.read_idx(folder / TEST_IMAGES, 3)).float()
    inner = data.test_images[:, 0, 2:30, 2:30]
    torch.testing.assert_close(
        (inner - background) / (inner.max() - background), raw / raw.max(), rtol=1e-4, atol=1e-5
    )


def test_gzipped_files_are_the_same_images(folder: Path) -> None:
    plain = fashion_mnist.load(folder)
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = fashion_mnist.load(folder)
    assert torch.equal(plain.train_images, zipped.train_images)
    assert torch.equal(plain.test_labels, zipped.test_labels)


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            TRAIN_IMAGES,
            lambda b: b[:-1],
            "expected 9408 bytes after the header (12×28×28), found 9407",
        ),
        (TEST_LABELS, lambda b: b + b"\0", "expected 5 bytes after the header (5), found 6"),
        (TRAIN_IMAGES, lambda b: b[:9], "expected 16 bytes of header, found 9 in all"),
        (TRAIN_LABELS, lambda b: b"", "begins with 00 00 08 01, found nothing"),
        (TEST_IMAGES, lambda b: b"PK\3\4" + b[4:], "begins with 00 00 08 03, found 50 4b 03 04"),
        (
            TEST_LABELS,
            lambda b: idx(np.zeros(4, np.uint8)),
            f"expected 5 labels, one for each image of {TEST_IMAGES}, found 4",
        ),
        (
            TRAIN_IMAGES,
            lambda b: idx(np.zeros((12, 8, 8), np.uint8)),
            "expected N×28×28 pixels, found 12×8×8",
        ),
        (
            TEST_IMAGES,
            lambda b: idx(np.zeros((0, 28, 28), np.uint8)),
            "expected N×28×28 pixels, found 0×28×28",
        ),
        (
            TRAIN_IMAGES,
            lambda b: idx(np.zeros((12, 28, 28), np.uint8)),
            "expected images, found one value in all pixels",
        ),
        (
            TRAIN_LABELS,
            lambda b: idx(np.full(12, 10, np.uint8)),
            "expected labels from 0 to 9, found 10",
        ),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, damage: Damage, message: str) -> None:
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as refused:
        fashion_mnist.load(folder)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:12] + b"x"]
)
def test_damaged_gzip_is_named(folder: Path, damage: Damage) -> None:
    plain, path = folder / TRAIN_LABELS, folder / f"{TRAIN_LABELS}.gz"
    path.write_bytes(damage(gzip.compress(plain.read_bytes())))
    plain.unlink()
    with pytest.raises(DataError, match=rf"{TRAIN_LABELS}\.gz: expected a whole gzip file, found"):
        fashion_mnist.load(folder)


def test_missing_data_stops_the_command_before_any_work(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fashion_mnist, "FOLDER", tmp_path / "not-installed")
    monkeypatch.setattr(quality, "run", lambda *_: pytest.fail("has begun to work"))
    (folder / TEST_LABELS).unlink()
    results = tmp_path / "results"
    for data, where, found in (
        ("fashion-mnist", tmp_path / "not-installed" / TRAIN_IMAGES, "no such folder"),
        ("mnist", Path("mnist") / TRAIN_IMAGES, "no such folder"),
        (str(folder), folder / TEST_LABELS, "no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["quality", "--data", data, "--output", str(results)])
        assert stopped.value.code == 2
        text = capsys.readouterr().err
        assert f"error: {where}: {found}; expected a folder with {TRAIN_IMAGES}" in text
        assert "the Debian package dataset-fashion-mnist" in text
    assert not list(results.iterdir())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one layer per block, and memory that need not be measured."""
    monkeypatch.setattr(quality, "QUICK_DEPTH", 10)
    figures = memory.StepMemory(8 * MIB, 9 * MIB, 7 * MIB, 7 * MIB, MIB)
    monkeypatch.setattr(memory, "measure_in_child", lambda case: figures)


def arguments(folder: Path, *more: str) -> list[str]:
    quiet = ["quality", "--no-progress", "--device", "cpu", "--data", str(folder)]
    return [*quiet, "--output", str(folder.parent / "results"), *more]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder.parent / "results" / "quality.json").read_text())


@pytest.mark.usefixtures("tiny")
def test_small_run_on_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, "--growth-rates", "4,2", "--rounds", "3")) == 0
    names = {path.name for path in (folder.parent / "results").iterdir()}
    assert names == {f"quality.{suffix}" for suffix in ("md", "json", "png", "svg")}
    record = record_of(folder)
    assert record["complete"]
    assert [entry["growth_rate"] for entry in record["growth"]] == [4, 2]
    assert [(entry["seed"], entry["peer"]) for entry in record["parity"]] == [
        (seed, peer) for seed in (0, 1, 2) for peer in quality.PARITY_PEERS
    ]
    for entry in record["growth"] + record["parity"]:
        assert len(entry["losses"]) == len(entry["seconds"]) == 3
        assert 0 <= entry["test_accuracy"] <= 1
    for naive, ours in zip(record["parity"][::2], record["parity"][1::2], strict=True):
        assert ours["losses"][0] == pytest.approx(naive["losses"][0], rel=1e-5)
        assert ours["parameters"] == naive["parameters"]
    text = capsys.readouterr().out
    assert f"the images of `{folder}`" in text
    assert "12 training and 5 test images" in text
    assert re.search(r"\| k=4 .* 8\.0 \|", text)
    assert "seed noise" in text
    rows = [line for line in text.splitlines() if line.startswith("|") and "mean" not in line]
    assert "—" not in "".join(rows)


@pytest.mark.usefixtures("tiny")
def test_parts_and_peers(folder: Path) -> None:
    chosen = ["--parts", "parity", "--peers", "ours-none,ours-block", "--rounds", "1"]
    assert cli.main(arguments(folder, *chosen)) == 0
    record = record_of(folder)
    assert not record["growth"]
    assert [entry["peer"] for entry in record["parity"][:3]] == [
        "naive-channels-last",
        "ours-none",
        "ours-block",
    ]
    text = quality_page.page(record).markdown()
    assert "## Growth rates" not in text
    assert len([line for line in text.splitlines() if line.startswith("- ")]) == 2


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("stop", [1, 4, 12])
def test_interrupted_run_keeps_what_it_has(
    stop: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def timed(call: Callable[[], object], device: torch.device) -> float:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return measure.timed(call, device)

    monkeypatch.setattr(train, "timed", timed)
    chosen = ["--growth-rates", "2,4", "--rounds", "2"]  # 4 steps, then 3 seeds of 4
    assert cli.main(arguments(folder, *chosen)) == cli.INTERRUPTED
    record = record_of(folder)
    assert sum(len(e["losses"]) for e in record["growth"] + record["parity"]) == stop - 1
    text = (folder.parent / "results" / "quality.md").read_text()
    assert "the results below are partial" in text
    assert "not judged" in text
    assert ("**Most accurate: k=" in text) == (stop > 2)
    assert (folder.parent / "results" / "quality.png").exists() == (stop > 1)
    assert not quality.failures(record)


def test_cases_without_memory_and_losses_that_are_no_numbers_fail() -> None:
    record = filled([0.5, 0.5], [0.5, 0.5])
    record["growth"][0]["memory"] = {"error": "does not fit"}
    record["growth"][1]["losses"] = [2.0, float("nan"), float("nan")]
    record["parity"][1]["test_loss"] = float("inf")
    assert quality.failures(record) == [
        "k=4: memory was not measured: does not fit",
        "k=8: the training loss is nan from step 2 on",
        "seed 0, ours-bottleneck: the test loss is inf",
    ]
    assert "- k=4: memory was not measured: does not fit" in quality_page.page(record).markdown()
    assert quality_page.figure(record) is not None


def filled(naive: list[float], ours: list[float], growth: tuple[float, ...] = (0.8, 0.9)) -> Any:
    """A record of that accuracy for each seed, and for growth rates 4, 8, ..."""
    rates = tuple(4 * (i + 1) for i in range(len(growth)))
    record = quality.plan(Options(growth_rates=rates))
    for rate, accuracy in zip(rates, growth, strict=True):
        entry = train.new_entry(growth_rate=rate, parameters=1000 * rate, test_accuracy=accuracy)
        record["growth"].append({**entry, "test_loss": 0.5, "losses": [2.0], "seconds": [1.0]})
    for seed, both in enumerate(zip(naive, ours, strict=True)):
        for peer, accuracy in zip(quality.PARITY_PEERS, both, strict=True):
            entry = train.new_entry(seed=seed, peer=peer, test_accuracy=accuracy, test_loss=0.5)
            record["parity"].append({**entry, "losses": [2.0], "seconds": [1.0]})
    record.update(command="", complete=True, environment=describe(torch.device("cpu")))
    return record


@pytest.mark.parametrize(
    ("own", "reference", "allowed", "within"),
    [
        # Variances of 1e-4 each: a standard error of 1e-2 · √(2/3).
        ([0.90, 0.91, 0.92], [0.91, 0.92, 0.93], 2e-2 * (2 / 3) ** 0.5, True),
        ([0.90, 0.91, 0.92], [0.92, 0.93, 0.94], 2e-2 * (2 / 3) ** 0.5, False),
        ([0.92, 0.93, 0.94], [0.90, 0.91, 0.92], 2e-2 * (2 / 3) ** 0.5, False),
        # The spread of one group alone.
        ([0.9, 0.9], [0.9, 0.92], 0.02, True),
        # No spread: one image of 100.
        ([0.9, 0.9, 0.9], [0.91, 0.91, 0.91], 0.01, True),
        ([0.9, 0.9, 0.9], [0.88, 0.88, 0.88], 0.01, False),
        ([1.0, 1.0], [1.0, 1.0], 0.01, True),
    ],
)
def test_seed_noise(own: list[float], reference: list[float], allowed: float, within: bool) -> None:
    found = quality_page.difference(own, reference, test_images=100)
    assert found is not None
    assert found.value == pytest.approx(sum(own) / len(own) - sum(reference) / len(reference))
    assert found.allowed == pytest.approx(allowed)
    assert found.within_noise == within


def test_one_seed_is_not_judged() -> None:
    assert quality_page.difference([0.9], [0.9, 0.9], 100) is None


def test_page_says_whether_accuracies_differ_and_does_not_fail() -> None:
    record = filled([0.90, 0.91, 0.92], [0.80, 0.81, 0.82])
    text = quality_page.page(record).markdown()
    assert "less accurate than naive, outside seed noise** (10.00 percentage points below" in text
    assert not quality.failures(record)
    text = quality_page.page(filled([0.90, 0.91, 0.92], [0.905, 0.915, 0.925])).markdown()
    assert "as accurate as naive, within seed noise** (0.50 percentage points above" in text
    assert "where chance explains 1.63" in text


def test_growth_verdict_names_the_smallest_that_may_be_as_good() -> None:
    text = quality_page.page(filled([], [], growth=(0.5, 0.9, 0.91, 0.88))).markdown()
    assert (
        "**Most accurate: k=12. k=8 is as accurate within two standard errors, with 66.7 %" in text
    )
    text = quality_page.page(filled([], [], growth=(0.5, 0.7, 0.9))).markdown()
    assert (
        "**Most accurate: k=12**, by more than two standard errors over every smaller one." in text
    )


def test_running_means() -> None:
    assert quality_page.running_means([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert quality_page.running_means([], 2) == []


def test_rounds_of_digits_are_whole_passes() -> None:
    quick, full = (quality.plan(Options(full=full))["settings"] for full in (False, True))
    assert [quick[key] for key in ("rounds", "round_steps", "steps")] == [3, 89, 267]
    assert [full[key] for key in ("rounds", "round_steps", "steps")] == [10, 22, 220]
    assert "a round is a pass over the training images" in quality_page._rounds_text(quick)


def test_rounds_of_large_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "QUICK_ROUND_IMAGES", 6)
    monkeypatch.setattr(quality, "QUICK_BATCH_SIZE", 3)
    monkeypatch.setattr(quality, "BATCH_SIZE", 3)
    monkeypatch.setattr(quality, "LARGE_DATA", 11)
    quick, full = (
        quality.plan(Options(full=full, data=str(folder)))["settings"] for full in (False, True)
    )
    assert [quick[key] for key in ("rounds", "round_steps", "steps")] == [3, 2, 6]
    assert [full[key] for key in ("rounds", "round_steps", "steps")] == [3, 4, 12]
    assert "a round is 50.0 % of a pass" in quality_page._rounds_text(quick)


@pytest.mark.parametrize(
    ("rates", "expected"), [(None, 8), ((4, 8), 8), ((24,), 24), ((32, 24), 32)]
)
def test_growth_rate_of_the_parity_part(rates: tuple[int, ...] | None, expected: int) -> None:
    assert quality.plan(Options(growth_rates=rates))["settings"]["parity_growth_rate"] == expected
