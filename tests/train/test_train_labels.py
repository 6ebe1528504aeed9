"""Tables of images with several labels each: `densenet-fast train --labels` and what follows."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")
pytest.importorskip("sklearn")

from PIL import Image
from sklearn import metrics
from training_runs import TINY, assert_same, comparable, content

from densenet_fast.train.command import main
from densenet_fast.train.errors import DataError
from densenet_fast.train.labels import Reading, read_table
from densenet_fast.train.tasks import Multilabel, auroc, make_task, masked_bce

Captured = pytest.CaptureFixture[str]
NAMES = ("Upper", "Left", "Round shadow")
HEADER = ("Path", *NAMES)
IGNORE = Reading(None, "ignore", "ignore")


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_xrays(folder: Path, count: int = 24) -> list[list[str]]:
    """Gray images of 16 bits, two of each patient, where labels are bright parts; rows of a table.

    Some labels are uncertain, some missing.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for n in range(count):
        marks = [n // 2 % 2, n // 4 % 2, n // 8 % 2]
        pixels = generator.integers(0, 9000, (20, 24)).astype(np.uint16)
        for mark, part in zip(marks, (np.s_[:10], np.s_[:, :12], np.s_[5:15, 6:18]), strict=True):
            pixels[part] += np.uint16(18000 * mark)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        cells = [f"{mark}.0" if n % 3 else str(mark) for mark in marks]
        if n % 5 == 4:
            cells[n % 3] = "" if n % 2 else "-1.0"
        rows.append([f"{n}.png", *cells])
    return rows


@pytest.fixture(scope="module")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, train.csv and val.csv."""
    folder = tmp_path_factory.mktemp("xrays") / "images"
    rows = write_xrays(folder)
    write_table(folder / "train.csv", [HEADER, *rows[:16]])
    write_table(folder / "val.csv", [HEADER, *rows[16:]])
    return folder


def run(xrays: Path, output: Path, *flags: str) -> int:
    where = ("--labels", str(xrays / "train.csv"), "--output-dir", str(output))
    usual = ("--in-chans", "1", "--batch-size", "4", "--lr", "0.05", "--workers", "0")
    if "--val-split" not in flags:
        usual = (*usual, "--val-labels", str(xrays / "val.csv"))
    return main(["train", *TINY, *where, *usual, *flags])


@pytest.fixture(scope="module")
def trained(xrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    flags = ("--epochs", "6", "--no-aug", "--class-weights", "balanced", "--growth-rate", "4")
    assert run(xrays, output, *flags) == 0
    return output


def test_area_under_the_curve_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 40):
        scores = torch.randint(0, 6, (n,), generator=generator).double()  # with ties
        labels = torch.randint(0, 2, (n,), generator=generator).double()
        labels[:2] = torch.tensor([0.0, 1.0])
        expected = metrics.roc_auc_score(labels.numpy(), scores.numpy())
        assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
        unknown = torch.full((3,), math.nan)
        more = torch.cat([scores, torch.arange(3.0)]), torch.cat([labels, unknown])
        assert auroc(*more) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(auroc(torch.ones(3), torch.ones(3)))


def test_masked_loss_is_the_mean_over_known_labels() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0.0, 1, math.nan], [math.nan] * 3, [1, 1, 0], [math.nan, 0, 1]])
    labels, weights = labels.double(), torch.tensor([1.0, 2, 3])
    terms = []
    for i, j in ((~labels.isnan()).nonzero()).tolist():
        p = logits[i, j].sigmoid()
        terms.append(-weights[j] * p.log() if labels[i, j] else -(1 - p).log())
    expected = torch.stack(terms).mean()
    found = masked_bce(logits, labels, weights)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: masked_bce(x, labels, weights), (logits,))
    nothing = masked_bce(logits, torch.full_like(labels, math.nan))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, logits)[0].any()
    assert_same(Multilabel(3).balance(labels), torch.tensor([1.0, 0.5, 1.0]))


def test_labels_are_learned_evaluated_and_predicted(
    xrays: Path, trained: Path, capsys: Captured
) -> None:
    """The figures are scikit-learn's, of the probabilities that `predict` says."""
    best, last = (content(trained, name) for name in ("best.pt", "last.pt"))
    areas = [row["val_auroc"] for row in last["history"]]
    assert best["history"][-1]["val_auroc"] == max(areas) > 0.9
    assert (best["task"], best["classes"]) == ("multilabel", list(NAMES))
    capsys.readouterr()
    checkpoint = ("--checkpoint", str(trained / "best.pt"))
    assert main(["evaluate", *checkpoint, "--labels", str(xrays / "val.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = [str(xrays / f"{n}.png") for n in range(16, 24)]
    assert main(["predict", *checkpoint, "--json", *files]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shares = torch.tensor(
        [
            [p["probability"] for p in sorted(line["predictions"], key=lambda p: p["index"])]
            for line in lines
        ],
        dtype=torch.float64,
    )
    labels = read_table(xrays / "val.csv", IGNORE).labels.double()
    known = ~labels.isnan()
    loss = -torch.where(labels == 1, shares.log(), (1 - shares).log())[known].mean()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for at, row in enumerate(found["classes"]):
        inside = known[:, at]
        truth, scores = labels[inside, at].numpy(), shares[inside, at].numpy()
        assert row["class"] == NAMES[at] and row["positives"] == truth.sum()
        assert row["negatives"] == len(truth) - truth.sum()
        defined = 0 < truth.sum() < len(truth)
        expected = pytest.approx(metrics.roc_auc_score(truth, scores)) if defined else None
        assert row["auroc"] == expected
    areas = [row["auroc"] for row in found["classes"]]
    assert areas[2] is None and found["auroc"] == pytest.approx(sum(areas[:2]) / 2)
    assert found["auroc"] == pytest.approx(best["history"][-1]["val_auroc"])
    assert shares.sum(1).max() > 1.1  # sigmoids
    assert main(["evaluate", *checkpoint, "--labels", str(xrays / "val.csv")]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].split() == ["class", "positives", "negatives", "auroc"]
    assert text[-1].startswith(f"8 images: loss {found['loss']:.4f}, AUROC {found['auroc']:.4f}")
    assert main(["predict", *checkpoint, "--top", "1", files[0]]) == 0
    assert capsys.readouterr().out.count("%") == 1


def test_stopped_and_resumed(xrays: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "2", "--grad-accum-steps", "2", "--norm-weight-decay", "0", "--amp")
    more = ("--opt", "adamw", "--model-ema", "--model-ema-steps", "1", "--model-ema-decay", "0.9")
    more += ("--val-split", "0.3", "--uncertain", "ones", "--missing", "zeros")
    more += ("--drop-rate", "0.1")
    assert run(xrays, tmp_path / "whole", *flags, *more) == 0
    assert run(xrays, tmp_path / "parts", *flags, *more, "--steps", "1") == 0
    assert content(tmp_path / "parts")["at"] == 1
    assert run(xrays, tmp_path / "parts", *flags, *more, "--resume", "auto") == 0
    assert_same(comparable(tmp_path / "whole"), comparable(tmp_path / "parts"))


@pytest.mark.parametrize("name", ["multiclass", "multilabel"])
def test_figures_of_several_processes_are_those_of_all_images(name: str) -> None:
    """Each process has its share, and torchmetrics puts them together as the metrics say."""
    torch.manual_seed(0)
    task, device = make_task(name, 3), torch.device("cpu")
    logits = torch.randn(7, 3)
    labels = torch.randint(0, 3, (7,)) if name == "multiclass" else (torch.rand(7, 3) > 0.5).float()
    whole, first, second = (task.meters(device, training=False) for _ in range(3))
    for meters, part in ((whole, np.s_[:]), (first, np.s_[:4]), (second, np.s_[4:])):
        loss = task.criterion()(logits[part], labels[part])
        meters.update(loss, logits[part], labels[part])
    for key, metric in first._metrics.items():
        metric.merge_state(second._metrics[key])
    found, expected = (task.figures(meters.compute()) for meters in (first, whole))
    assert found.whole == pytest.approx(expected.whole)
    assert [list(row.values()) for row in found.by_class] == [
        pytest.approx(list(row.values()), nan_ok=True) for row in expected.by_class
    ]


def test_styles_of_tables(tmp_path: Path) -> None:
    """CheXpert's columns, and NIH's findings; what is not known is as the flags say."""
    folder = tmp_path / "images"
    write_xrays(folder, 4)
    chexpert = write_table(
        folder / "chexpert.csv",
        [
            ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Edema"),
            ("0.png", "Male", "68", "Frontal", "AP", "1.0", ""),
            ("1.png", "Female", "87", "Lateral", "", "", "-1.0"),
        ],
    )
    nan = math.nan
    for uncertain, missing, expected in (
        ("ignore", "ignore", [[1, nan], [nan, nan]]),
        ("zeros", "ignore", [[1, nan], [nan, 0]]),
        ("ones", "zeros", [[1, 0], [0, 1]]),
    ):
        table = read_table(chexpert, Reading(None, uncertain, missing))
        assert table.classes == ("No Finding", "Edema")
        np.testing.assert_array_equal(table.labels.numpy(), np.array(expected))
    chosen = read_table(chexpert, IGNORE, ["Edema", "No Finding"])
    assert chosen.labels[0].tolist()[1] == 1
    (folder / "below").mkdir()
    (folder / "3.png").rename(folder / "below" / "3.png")
    nih = write_table(
        folder / "nih.csv",
        [
            ("Image Index", "Finding Labels", "Patient ID", "Patient Age"),
            ("1.png", "Mass|Hernia", "7", "60"),
            ("3.png", "No Finding", "8", "60"),
            ("0.png", "Mass", "7", "60"),
        ],
    )
    table = read_table(nih, IGNORE)
    assert table.classes == ("Hernia", "Mass")
    assert table.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert table.files[1] == str(folder / "below" / "3.png")
    assert (table.groups, table.grouped) == (["7", "8", "7"], "column 'Patient ID'")
    with pytest.raises(DataError, match="line 2: 'Hernia' is none of the labels Mass"):
        read_table(nih, IGNORE, ["Mass"])
    assert read_table(nih, IGNORE._replace(others=True), ["Mass"]).labels.sum() == 2
    nih.write_text(nih.read_text().replace("No Finding", "Mass|"))
    with pytest.raises(DataError, match="line 3: '' is none of the labels Hernia, Mass"):
        read_table(nih, IGNORE._replace(others=True))


def by_patient(rows: list[list[str]], folder: Path, start: int = 0) -> list[list[str]]:
    """CheXpert's paths: two images for each patient."""
    moved = []
    for n, (name, *cells) in enumerate(rows):
        file = f"patient{start + n // 2:05}/study1/view{n % 2 + 1}_frontal.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(folder / file)
        moved.append([file, *cells])
    return moved


def test_patients_by_folder_are_never_on_both_sides(
    xrays: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "images"
    rows = by_patient(write_xrays(folder), folder)
    table = write_table(folder / "all.csv", [HEADER, *rows])
    flags = ("--labels", str(table), "--epochs", "1", "--steps", "1")
    assert run(xrays, tmp_path / "a", *flags, "--val-split", "0.25") == 0
    said = "all.csv: by folders patientNNNNN, 9 in training and 3 others in validation"
    assert said in capsys.readouterr().out
    found = content(tmp_path / "a")["data"]
    assert (found["train"], found["val"]) == (18, 6)
    one = ("--group-column", "Path")
    assert run(xrays, tmp_path / "b", *flags, "--val-split", "0.25", *one) == 0
    assert "by column 'Path', 18 in training and 6 others" in capsys.readouterr().out
    first, other = (
        write_table(folder / f"{n}.csv", [HEADER, *part])
        for n, part in enumerate((rows[:15], rows[15:]))
    )
    flags = ("--labels", str(first), "--val-labels", str(other), "--epochs", "1", "--steps", "1")
    assert run(xrays, tmp_path / "c", *flags) == 2
    assert "'patient00007' (by folders patientNNNNN) is in " in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert run(xrays, tmp_path / "c", *flags, *one) == 0


def test_columns_of_patients_are_whole(xrays: Path, tmp_path: Path, capsys: Captured) -> None:
    rows = [[name, *cells, f"P{n // 3}"] for n, (name, *cells) in enumerate(write_rows(xrays))]
    flags = ("--data-path", str(xrays), "--val-split", "0.3", "--epochs", "1", "--steps", "1")
    for name, column in (("Patient ID", ()), ("Hospital", ("--group-column", "Hospital"))):
        table = write_table(tmp_path / "all.csv", [(*HEADER, name), *rows])
        output = tmp_path / name
        assert run(xrays, output, "--labels", str(table), *flags, *column) == 0
        assert f"by column {name!r}, " in capsys.readouterr().out
        assert content(output)["classes"] == list(NAMES)
    rows[4][-1] = ""
    table = write_table(tmp_path / "all.csv", [(*HEADER, "Patient ID"), *rows])
    assert run(xrays, tmp_path / "out", "--labels", str(table), *flags) == 2
    said = f"all.csv: expected a value in column 'Patient ID', {xrays / '4.png'} has none"
    assert said in capsys.readouterr().err
    trained = ("--checkpoint", str(tmp_path / "Hospital" / "last.pt"))
    assert main(["evaluate", *trained, "--labels", str(table), "--data-path", str(xrays)]) == 0
    table = write_table(tmp_path / "all.csv", [HEADER, *(row[:-1] for row in rows)])
    assert run(xrays, tmp_path / "out", "--labels", str(table), *flags) == 0
    assert "nothing tells patients apart" in capsys.readouterr().out


def write_rows(xrays: Path) -> list[list[str]]:
    """The rows of both tables of the fixture."""
    rows = []
    for name in ("train.csv", "val.csv"):
        with (xrays / name).open(newline="") as file:
            rows += list(csv.reader(file))[1:]
    return rows


def changed(row: int, column: int, value: str) -> Callable[[list[list[str]]], object]:
    def change(rows: list[list[str]]) -> None:
        rows[row][column] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(2, 0, "none.png"), "line 3: no file 'none.png' in "),
        (changed(2, 0, "3.png"), "line 5: '3.png' is in line 3 already"),
        (changed(2, 1, "yes"), "line 3: expected 1, 0, -1 or nothing in column 'Upper', got 'yes'"),
        (changed(2, 1, "0.5"), "line 3: expected 1, 0, -1 or nothing in column 'Upper', got '0.5'"),
        (changed(0, 2, "Upper"), "line 1: two columns are called 'Upper'"),
        (lambda rows: rows[2].append("1"), "line 3: expected 4 values, got 5"),
        (lambda rows: [row.__delitem__(np.s_[1:]) for row in rows], "line 1: expected a column of"),
        (lambda rows: rows.__delitem__(np.s_[1:]), "line 1: no image follows the names"),
        (lambda rows: rows.clear(), "line 1: expected a column of files and columns of labels"),
        (
            lambda rows: [row.__setitem__(2, "0") for row in rows[1:]],
            "none of 16 images of training is positive for 'Left'",
        ),
        (changed(3, 0, "20.png"), "20.png is in "),
    ],
)
def test_tables_that_are_wrong(
    xrays: Path,
    tmp_path: Path,
    capsys: Captured,
    change: Callable[[list[list[str]]], object],
    said: str,
) -> None:
    with (xrays / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    table = write_table(tmp_path / "wrong.csv", rows)
    flags = ("--labels", str(table), "--data-path", str(xrays))
    assert run(xrays, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert said in error and "wrong.csv" in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_fit_labels(
    xrays: Path, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    wrong: dict[tuple[str, ...], str] = {
        ("--mixup-alpha", "1"): "--mixup-alpha 1.0 applies to one class an image, not to --labels",
        ("--label-smoothing", "0.1"): "--label-smoothing 0.1 applies to one class an image",
        ("--group-column", "Pat"): "line 1: there is no column 'Pat', but Path, Upper",
        ("--label-names", "Upper", "Lower"): "line 1: there is no column 'Lower', but Path, Upper",
        ("--label-names", "Upper", "Upper"): "--label-names: 'Upper' is given twice",
        ("--data", "digits"): "--data digits does not go with --labels: --data-path says",
        ("--download",): "--download does not go with --labels",
        ("--data-path", "nowhere"): "--data-path nowhere: no such folder",
        ("--labels", "nowhere.csv"): "nowhere.csv is no table (CSV, UTF-8): ",
        ("--labels", str(xrays / "1.png")): "1.png is no table (CSV, UTF-8): ",
        ("--val-labels", str(xrays / "train.csv")): "expected other images in each",
    }
    for flags, said in wrong.items():
        assert run(xrays, tmp_path / "out", *flags) == 2
        assert said in capsys.readouterr().err, flags
    main_flags = ("train", *TINY, "--output-dir", str(tmp_path / "out"))
    for flags, said in (
        (("--labels", str(xrays / "train.csv")), "--labels needs --val-labels CSV, or --val-split"),
        (("--uncertain", "ones"), "--uncertain ones applies to --labels alone"),
        (("--label-names", "a", "b"), "--label-names a b applies to --labels alone"),
        (("--group-column", "Path"), "--group-column Path applies to --labels alone"),
    ):
        assert main([*main_flags, *flags]) == 2
        assert said in capsys.readouterr().err
    checkpoint = ("--checkpoint", str(trained / "best.pt"))
    assert main(["evaluate", *checkpoint, "--data-path", str(xrays)]) == 2
    assert "--labels is needed: the network answers with several labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_corrupt_images_of_tables(xrays: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "images"
    rows = write_xrays(folder, 12)
    table = write_table(folder / "all.csv", [HEADER, *rows])
    (folder / "5.png").write_text("no image")
    flags = ("--labels", str(table), "--val-split", "0.5", "--epochs", "1", "--steps", "1")
    assert run(xrays, tmp_path / "out", *flags) == 2
    assert f"corrupt image {folder / '5.png'}" in capsys.readouterr().err
    assert run(xrays, tmp_path / "out", *flags, "--on-corrupt", "skip") == 0
    assert "1 corrupt images left out" in capsys.readouterr().out
    found = content(tmp_path / "out")["data"]
    assert found["train"] + found["val"] == 11
