"""`training`, `quality` and `finetune`: what they train on, and how they compare the results."""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from made_up import CPU, MIB, PROC, page, planned

pytest.importorskip("sklearn")

from benchmarks import cli, datasets, peers
from benchmarks.datasets import Images
from benchmarks.networks import densenet_bc, imagenet
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.suites import Options, finetune, quality, step, training
from densenet_fast.train import idx
from densenet_fast.train.errors import DataError

# ---- Images


def write_idx(path: Path, array: Any) -> None:
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 12 training and 5 test images."""
    generator, path = np.random.default_rng(0), tmp_path / "data"
    path.mkdir()
    for count, (images, labels) in ((12, idx.TRAIN), (5, idx.TEST)):
        write_idx(path / images, generator.integers(0, 256, (count, 28, 28)))
        write_idx(path / labels, np.arange(count) % 10)
    return path


def test_digits_are_split_and_normalised() -> None:
    data = datasets.digits(size=16)
    assert data.train_images.shape == (datasets.TRAIN_DIGITS, 1, 16, 16)
    assert data.test_images.shape == (datasets.TEST_DIGITS, 1, 16, 16)
    assert data.train_images.mean().abs() < 1e-4
    batches = list(datasets.batches(data, 700, 5, seed=0))
    assert [len(labels) for _, labels in batches] == [700] * 5
    first = torch.cat([batches[0][0], batches[1][0]])
    assert len(first.flatten(1).unique(dim=0)) > 1390  # an epoch draws no image twice


def test_images_of_a_folder_are_padded_and_normalised(folder: Path) -> None:
    data = datasets.load(str(folder), 0)
    assert data.train_images.shape == (12, 1, 32, 32)
    assert data.test_labels.tolist() == list(range(5))
    std, mean = torch.std_mean(data.train_images)
    assert abs(mean) < 1e-5 and abs(std - 1) < 1e-5
    background = data.train_images[0, 0, 0, 0]
    assert (data.train_images[..., :2] == background).all()
    assert (data.test_images[..., 30:, :] == background).all()
    raw = torch.from_numpy(idx.read_idx(folder / idx.TEST[0], 3)).float()
    inner = data.test_images[:, 0, 2:30, 2:30] - background
    torch.testing.assert_close(inner / inner.max(), raw / raw.max(), rtol=1e-4, atol=1e-5)
    write_idx(folder / idx.TRAIN[0], np.zeros((12, 28, 28)))
    with pytest.raises(DataError, match="expected images, found one value in all pixels"):
        datasets.load(str(folder), 0)


@pytest.mark.parametrize("suite", ["quality", "finetune"])
def test_missing_data_stops_the_command_before_any_work(
    suite: str, folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setattr(cli, "run_tasks", lambda *_, **named: pytest.fail("has begun to work"))
    missing = folder / idx.TEST[1]
    missing.unlink()
    for data, said in (
        ("mnist", f"{Path('mnist') / idx.TRAIN[0]}: no such folder; expected a folder with"),
        (str(folder), f"{missing}: no such file; expected a folder with"),
    ):
        assert said in refused(suite, "--data", data)


# ---- The main job


@pytest.mark.slow
@PROC
@pytest.mark.usefixtures("threads", "forked_children")
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_main_job_writes_its_results_and_the_losses_agree(run: Any, tmp_path: Path) -> None:
    chosen = ["--growth-rates", "12", "--rounds", "3", "--threads", "1"]
    chosen += ["--peers", "naive-channels-last,ours-bottleneck"]
    record, text = run("training", *chosen)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"training.{suffix}" for suffix in ("md", "json", "png", "svg")}
    assert record["complete"] and record["environment"]["threads"] == 1
    names = [row["peer"] for row in record["rows"]]
    assert names == ["naive", "naive-channels-last", "ours-bottleneck"]
    for row in record["rows"]:
        assert row["memory"]["peak_gradients_allocated"] > MIB
        assert 0 <= row["training"]["test_accuracy"] <= 1
        for key in ("losses", "test_loss"):
            expected = record["rows"][0]["parity"][key]
            assert row["parity"][key] == pytest.approx(expected, rel=1e-9)
    assert len([line for line in text.splitlines() if line.startswith("| k=12")]) == 3
    assert "machine:" in text and "![" in text


def test_disagreement_and_what_was_not_measured_fail() -> None:
    record = planned(
        "training", growth_rates=(12,), peers=("naive", "memory-efficient", "ours-none")
    )
    naive, efficient, ours = record["rows"]
    naive["parity"] = {"losses": [2.5, 2.0], "test_loss": 2.0}
    efficient["parity"] = {"losses": [2.5, 2.0], "test_loss": 2.1}  # cannot agree
    ours["parity"] = {"losses": [2.5, 2.001], "test_loss": 2.2}
    naive["memory"] = {"error": "does not fit"}
    assert training.SUITE.failures(record) == [
        "memory of k=12, naive: does not fit",
        "k=12: the float64 losses of ours-none differs from naive's by 5.0e-04, more than 1e-09",
        "k=12: the float64 test loss of ours-none differs from naive's by 1.0e-01, more than 1e-09",
    ]
    ours["parity"] = {"losses": []}
    assert len(training.SUITE.failures(record)) == 1


def test_stages_and_differences() -> None:
    assert training.stages([1, 3, 5, 7, 9], 2) == [2, 7]
    assert training.stages([4.0], 2) == [4]
    assert training.apart([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert training.apart([float("nan")], [1.0]) == float("inf")


# ---- Quality


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of one layer per block, and memory that need not be measured."""
    monkeypatch.setattr(quality, "DEPTHS", (10, 10))
    measured = {"peak_gradients_allocated": 8 * MIB}
    monkeypatch.setattr(step, "figures_in_child", Mock(return_value=measured))


@pytest.mark.usefixtures("quick")
def test_quality_of_a_folder(folder: Path, run: Any) -> None:
    chosen = ("--data", str(folder), "--growth-rates", "4,2", "--rounds", "3")
    record, text = run("quality", *chosen)
    rows = record["rows"]
    assert [row["growth_rate"] for row in rows] == [4, 2, *[4] * 6]
    assert [(row["seed"], row["peer"]) for row in rows[2:]] == [
        (seed, peer) for seed in range(3) for peer in quality.PARITY_PEERS
    ]
    assert all(len(row["training"]["losses"]) == 3 for row in rows)
    for naive, ours in zip(rows[2::2], rows[3::2], strict=True):
        first = naive["training"]["losses"][0]
        assert ours["training"]["losses"][0] == pytest.approx(first, rel=1e-5)
    assert "train images: 12; test images: 5" in text
    assert "standard error" in text and "seed noise" in text


def test_quality_of_which_nothing_is_trained_yet() -> None:
    record = planned("quality")
    record["rows"][0]["training"] = {"losses": [2.0], "seconds": [0.5]}
    text = page(record)
    assert "not judged" in text and "standard error" not in text
    assert not quality.SUITE.failures(record)


def test_naive_is_among_the_peers_and_named_rates_hold_for_both_parts() -> None:
    record = quality.SUITE.plan(Options(peers=("ours-none",), parts=("parity",)))
    assert record["settings"]["parity_peers"] == ["naive-channels-last", "ours-none"]
    assert {row["part"] for row in record["rows"]} == {"parity"}
    for rates, expected in ((None, 8), ((4, 8), 8), ((24,), 24), ((32, 24), 32)):
        rows = quality.SUITE.plan(Options(growth_rates=rates))["rows"]
        assert rows[-1]["growth_rate"] == expected


def test_rounds_are_whole_passes_but_of_large_data_in_the_quick_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(full: bool, data: str | None = None) -> list[int]:
        settings = quality.SUITE.plan(Options(full=full, data=data))["settings"]
        return [settings[key] for key in ("rounds", "round_steps", "steps")]

    assert (steps(False), steps(True)) == ([3, 89, 267], [10, 22, 220])
    monkeypatch.setattr(quality, "QUICK_ROUND_IMAGES", 6)
    monkeypatch.setattr(quality, "BATCH_SIZES", (3, 3))
    monkeypatch.setattr(quality, "LARGE_DATA", 11)
    assert (steps(False, str(folder)), steps(True, str(folder))) == ([3, 2, 6], [3, 4, 12])


@pytest.mark.parametrize(
    ("own", "naive", "allowed", "verdict"),
    [
        # Variances of 1e-4 each: a standard error of 1e-2 · √(2/3).
        ([0.90, 0.91, 0.92], [0.91, 0.92, 0.93], 1.63, "as"),
        ([0.90, 0.91, 0.92], [0.92, 0.93, 0.94], 1.63, "less"),
        ([0.92, 0.93, 0.94], [0.90, 0.91, 0.92], 1.63, "more"),
        ([0.9, 0.9], [0.9, 0.92], 2.00, "as"),  # the spread of one group alone
        ([0.9, 0.9, 0.9], [0.91, 0.91, 0.91], 1.00, "as"),  # no spread: one image of 100
        ([0.9, 0.9, 0.9], [0.88, 0.88, 0.88], 1.00, "more"),
        ([1.0, 1.0], [1.0, 1.0], 1.00, "as"),
    ],
)
def test_seed_noise(own: Any, naive: Any, allowed: float, verdict: str) -> None:
    text = quality.parity_verdict(own, naive, test_images=100)
    assert text.startswith(f"**{verdict} ")
    assert f"chance explains {allowed:.2f}" in text
    assert quality.parity_verdict(own[:1], naive, 100).startswith("not judged")


def test_an_accuracy_has_a_standard_error() -> None:
    assert quality.standard_error({"test_accuracy": 0.9, "test_images": 100}) == pytest.approx(0.03)


def test_losses_that_are_no_numbers_fail() -> None:
    record = planned("quality", growth_rates=(4, 8))
    record["rows"][0]["memory"] = {"error": "does not fit"}
    record["rows"][1]["training"] = {"losses": [2.0, float("nan")]}
    record["rows"][3]["training"] = {"losses": [2.0], "test_loss": float("inf")}
    assert quality.SUITE.failures(record) == [
        "memory of k=4, seed 0, ours-bottleneck: does not fit",
        "k=8, seed 0, ours-bottleneck: a loss is nan",
        "k=8, seed 0, ours-bottleneck: a loss is inf",
    ]


# ---- Fine-tuning


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A tiny network; what memory is asked of."""
    spec = replace(imagenet(10, 4, (1, 2)), num_init_features=8, image_size=40, batch_size=8)
    monkeypatch.setattr(finetune, "SPEC", replace(spec, num_classes=5))
    asked = Mock(side_effect=({"peak_gradients_allocated": n * MIB} for n in itertools.count(1)))
    monkeypatch.setattr(step, "figures_in_child", asked)
    return asked


def images(count: int) -> Images:
    pixels = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    return Images(pixels, labels, pixels[:10], labels[:10])


def test_classes_are_halved() -> None:
    whole = images(20)
    first, later = (finetune.part_of(whole, later=later) for later in (False, True))
    assert first.train_labels.tolist() == later.train_labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert torch.equal(later.train_images[0], whole.train_images[5])
    assert torch.equal(first.test_images, whole.test_images[:5])


@pytest.mark.usefixtures("tiny")
def test_everything_but_the_classifier_comes_from_the_file(tmp_path: Path) -> None:
    made = build(PEERS["naive"], finetune.SPEC, initial_state(finetune.SPEC, 3), device=CPU)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    state = finetune.new_classifier(tmp_path / "weights.pth", seed=0)
    fresh = initial_state(finetune.SPEC, 1)
    assert state.keys() == made.state_dict().keys()
    for key, value in made.state_dict().items():
        expected = fresh[key] if key.startswith("classifier.") else value
        assert torch.equal(state[key], expected), key


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fine_tuning_runs_and_resumes(run: Any, tiny: Mock, tmp_path: Path) -> None:
    record, text = run("finetune", "--rounds", "3")
    naive, *others = (row["training"]["losses"] for row in record["rows"])
    for losses in others:  # the same weights, batches and recipe
        torch.testing.assert_close(losses, naive, rtol=1e-3, atol=1e-3)
    assert "torchvision after densenet_fast.convert" in text
    assert "## The file's network, on its own classes" in text
    del record["rows"][1]["training"]["test_loss"], record["rows"][2]["memory"]
    (tmp_path / "finetune.json").write_text(json.dumps(record))
    weights = tmp_path / finetune.WEIGHTS
    tiny.reset_mock()
    after, _ = run("finetune", "--rounds", "3", "--resume")
    assert [call.args[0].peer for call in tiny.call_args_list] == ["ours-bottleneck"]
    assert after["pretraining"] == record["pretraining"]
    assert all(len(row["training"]["losses"]) == 3 for row in after["rows"])
    weights.unlink()  # is made again
    again, _ = run("finetune", "--rounds", "3", "--resume")
    assert weights.is_file() and again["rows"] == after["rows"]


def test_data_of_too_few_images_are_refused(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    whole = images(200)
    lacking = replace(whole, train_labels=whole.train_labels % 5)
    monkeypatch.setattr(datasets, "load", lambda data, seed: lacking)
    said = "at least 32 training images and one test image with labels 5 and above, got 0 and 5"
    assert said in refused("finetune")


# ---- All peers have the same weights


@pytest.mark.parametrize("compression", [0.5, 0.7])
@pytest.mark.parametrize("small_inputs", [True, False])
def test_all_peers_share_names_and_function(small_inputs: bool, compression: float) -> None:
    spec = densenet_bc(10, 4, batch_size=2) if small_inputs else imagenet(10, 32, (2, 2))
    spec = replace(spec, compression=compression, num_classes=5, image_size=32, batch_size=2)
    state = initial_state(spec, seed=3)
    given = torch.randn(spec.input_shape, dtype=torch.float64)
    naive = None
    libraries = () if small_inputs or compression != 0.5 else ("monai", "timm")
    for peer in (PEERS[name] for name in (*peers.BASIC_PEERS, *libraries)):
        pytest.importorskip(peer.requires)  # the libraries are the last
        model = build(peer, spec, state, device=CPU, dtype=torch.float64).eval()
        assert list(model.state_dict()) == list(state) or peer.name == "monai"
        with torch.no_grad():
            output = model(given.contiguous(memory_format=peer.memory_format))
        naive = output if naive is None else naive
        torch.testing.assert_close(output, naive, rtol=1e-9, atol=1e-12)


def test_initial_state_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds GPUs"))
    spec, before = densenet_bc(10, 4, batch_size=2), torch.get_rng_state()
    first, again, other = (initial_state(spec, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert torch.equal(before, torch.get_rng_state())
