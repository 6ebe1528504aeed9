"""Flags that users of torchvision's and timm's training scripts look for."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from PIL import Image
from torchvision.transforms import v2
from training_runs import TINY, assert_same, content, train, write_folder

from densenet_fast.train import load, loop, optimization, setup
from densenet_fast.train.arguments import make_parser
from densenet_fast.train.command import main
from densenet_fast.train.data import Setting, open_data
from densenet_fast.train.distributed import Processes
from densenet_fast.train.rules import complete
from densenet_fast.train.tasks import Multiclass
from densenet_fast.train.transforms import Augmentation, Preprocessing, preprocessing

Captured = pytest.CaptureFixture[str]
PLAIN = ("--workers", "0", "--epochs", "1", "--no-progress")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 24×24 in train/ and val/."""
    where = tmp_path_factory.mktemp("data") / "images"
    write_folder(where, count=5, size=24)
    for file in where.rglob("*.png"):
        with Image.open(file) as image:
            image.crop((0, 0, 24, 24)).save(file)
    return where


def parsed(*flags: str) -> Namespace:
    arguments = make_parser().parse_args(["train", *TINY, *flags])
    complete(arguments)
    return arguments


def test_accumulated_gradients_are_those_of_all_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    images, labels = torch.randn(5, 3, 2, 2).double(), torch.tensor([0, 1, 2, 1, 1])
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(network(images), labels), list(network.parameters())
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    step = loop.Step(
        network,
        optimizer,
        torch.amp.GradScaler("cpu", enabled=False),
        loop.Placement(torch.device("cpu"), torch.contiguous_format, None),
        criterion=nn.CrossEntropyLoss(),
        batch_size=2,
        clip=None,
    )
    loss, logits = step(images, labels)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_steps_of_several_batches(folder: Path, tmp_path: Path) -> None:
    """Ten images, two batches of three a step: two steps, the last one of three and one."""
    flags = (*PLAIN, "--grad-accum-steps", "2")
    assert train(folder, tmp_path / "a", *flags, batch_size=4) == 0
    found = content(tmp_path / "a")
    assert found["steps"] == 2 and found["arguments"]["grad_accum_steps"] == 2
    average = ("--model-ema", "--epochs", "80", "--model-ema-decay", "0.9", "--batch-size", "2")
    decay = optimization.average_decay(parsed(*average, "--grad-accum-steps", "3"), 1)
    assert decay == pytest.approx(1 - 0.1 * 2 * 3 * 32 / 80)


@pytest.mark.parametrize(
    ("flags", "kind", "settings"),
    [
        (("--opt", "sgd"), torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        (
            ("--opt", "sgd_nesterov", "--momentum", "0.8"),
            torch.optim.SGD,
            {"momentum": 0.8, "nesterov": True},
        ),
        (("--opt", "sgd", "--momentum", "0"), torch.optim.SGD, {"momentum": 0}),
        (("--opt", "rmsprop"), torch.optim.RMSprop, {"alpha": 0.9, "eps": 0.0316}),
        (("--opt", "adamw", "--weight-decay", "0.02"), torch.optim.AdamW, {"weight_decay": 0.02}),
    ],
)
def test_optimizers(
    flags: tuple[str, ...], kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    arguments = parsed(*flags)
    made = optimization.make_optimizer(arguments, model)
    assert type(made) is kind
    group = made.param_groups[0]
    assert len(group["params"]) == 1 and group["lr"] == 0.1
    assert {name: group[name] for name in settings} == settings
    made.param_groups[0]["params"][0].grad = torch.ones(1, 1)
    made.step()
    names = [name for state in made.state.values() for name, v in state.items() if v is not None]
    counted = ["step"] if optimization.counts_steps(arguments) else []
    assert sorted(names) == sorted([*optimization.kept(arguments), *counted])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {1e-4: {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}}),
        (
            ("--norm-weight-decay", "0"),
            {1e-4: {"conv.weight", "conv.bias"}, 0: {"norm.weight", "norm.bias"}},
        ),
        (
            ("--norm-weight-decay", "0.5", "--bias-weight-decay", "0"),
            {1e-4: {"conv.weight"}, 0.5: {"norm.weight"}, 0: {"conv.bias", "norm.bias"}},
        ),
    ],
)
def test_weight_decay_of_norms_and_biases(
    flags: tuple[str, ...], expected: dict[float, set[str]]
) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 2, 1))
    model.add_module("norm", nn.BatchNorm2d(2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optimization.make_optimizer(parsed(*flags), model)
    found = {g["weight_decay"]: {names[p] for p in g["params"]} for g in optimizer.param_groups}
    assert found == expected


@pytest.mark.parametrize("size", [None, 40])
def test_ratio_of_what_is_cut_out(size: int | None) -> None:
    """As torchvision cuts it."""
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    plain = preprocessing(size, (0.0,) * 3, (1.0,) * 3)
    arguments = parsed("--ratio", "0.5", "0.5", "--hflip", "0", "--scale", "0.5", "0.5")
    setting = Setting(Namespace(size=size, flip=True), plain, 0, 40)  # type: ignore[arg-type]
    torch.manual_seed(0)
    found = setup.training_transform(arguments, setting, 20)(image)
    torch.manual_seed(0)
    expected = v2.RandomResizedCrop(20, (0.5, 0.5), (0.5, 0.5))(image) / 255
    torch.testing.assert_close(found, expected)
    arguments.scale = None  # with the usual shares then, also of images of one size
    torch.manual_seed(0)
    found = setup.training_transform(arguments, setting, 20)(image)
    torch.manual_seed(0)
    torch.testing.assert_close(found, v2.RandomResizedCrop(20, ratio=(0.5, 0.5))(image) / 255)


def test_flips_jitter_and_none() -> None:
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    plain = preprocessing(None, (0.5,) * 3, (0.25,) * 3)
    upright = Augmentation(12, (1.0, 1.0)).transform(plain, None)
    torch.manual_seed(0)  # of the ratio of the cut
    expected = upright(image)
    for flips, dims in (((1.0, 0.0), [2]), ((0.0, 1.0), [1]), ((1.0, 1.0), [1, 2])):
        turned = Augmentation(12, (1.0, 1.0), *flips).transform(plain, None)
        torch.manual_seed(0)
        assert torch.equal(turned(image), expected.flip(dims))
    jittered = Augmentation(12, (1.0, 1.0), jitter=0.4).transform(plain, None)
    torch.manual_seed(0)
    assert not torch.equal(jittered(image), expected)
    arguments = parsed("--no-aug")
    setting = Setting(Namespace(size=None, flip=True), plain, 0, 224)  # type: ignore[arg-type]
    none = setup.training_transform(arguments, setting, 224)
    assert torch.equal(none(image), plain.transform()(image))


def test_interpolation_and_crop_percentage(folder: Path, tmp_path: Path) -> None:
    flags = ("--interpolation", "bicubic", "--crop-pct", "0.8", "--val-crop-size", "20")
    assert train(folder, tmp_path / "a", *PLAIN, *flags, "--train-crop-size", "20") == 0
    kept = content(tmp_path / "a")["preprocessing"]
    assert (kept["resize"], kept["crop"], kept["interpolation"]) == (25, 20, "bicubic")
    pixels = torch.randint(0, 256, (3, 31, 40), dtype=torch.uint8)
    found = Preprocessing(25, 20, (0.0,) * 3, (1.0,) * 3, "bicubic").transform()(pixels)
    resized = v2.functional.resize(pixels, [25], v2.InterpolationMode.BICUBIC, antialias=True)
    expected = v2.functional.center_crop(resized, [20, 20]) / 255
    torch.testing.assert_close(found, expected)


def test_held_out_images(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    """A share of each class, the same in every run of a seed; folders without train/ do too."""
    flat = tmp_path / "flat"
    shutil.copytree(folder / "train", flat)
    flags = (*PLAIN, "--val-split", "0.4")
    assert train(flat, tmp_path / "a", *flags) == 0
    found = content(tmp_path / "a")["data"]
    assert (found["train"], found["val"]) == (6, 4)
    shutil.copytree(folder / "train", tmp_path / "nested" / "train")
    for name, seed, same in (("b", "0", True), ("c", "1", False)):
        assert train(tmp_path / "nested", tmp_path / name, *flags, "--seed", seed) == 0
        assert (content(tmp_path / name)["data"] == found) == same
    assert train(flat, tmp_path / "a", *flags, "--epochs", "2", "--resume", "auto") == 0
    assert train(folder, tmp_path / "d", *flags) == 2
    assert "--val-split is for folders without it" in capsys.readouterr().err
    # A folder of classes alone is evaluated as it is.
    checkpoint = ("--checkpoint", str(tmp_path / "a" / "last.pt"))
    assert main(["evaluate", *checkpoint, "--data-path", str(flat), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 10


def test_class_map_has_the_order_of_classes(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "map.txt").write_text("dog\n\ncat\n")
    flags = (*PLAIN, "--class-map", str(tmp_path / "map.txt"))
    assert train(folder, tmp_path / "a", *flags) == 0
    assert content(tmp_path / "a")["classes"] == ["dog", "cat"]
    capsys.readouterr()
    given = ("--checkpoint", str(tmp_path / "a" / "last.pt"), "--data-path", str(folder))
    assert main(["evaluate", *given]) == 2
    assert "'cat' where it has 'dog'" in capsys.readouterr().err
    assert main(["evaluate", *given, "--json", "--class-map", str(tmp_path / "map.txt")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == content(tmp_path / "a")["history"][-1]["val_top1"]
    shutil.copytree(folder / "val" / "cat", tmp_path / "some" / "cat")  # without any dog
    some = ("--data-path", str(tmp_path / "some"), "--class-map", str(tmp_path / "map.txt"))
    assert main(["evaluate", *given[:2], *some, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["classes"]
    assert [(row["class"], row["images"]) for row in rows] == [("dog", 0), ("cat", 5)]
    assert rows[0]["recall"] is None
    for text, said in (("dog\n", "it has no 'cat'"), ("cat\ndog\ncat\n", "'cat' is there twice")):
        (tmp_path / "map.txt").write_text(text)
        assert train(folder, tmp_path / "b", *flags) == 2
        assert said in capsys.readouterr().err


def test_channels_means_and_deviations(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    flags = (*PLAIN, "--in-chans", "1", "--mean", "0.3", "--std", "0.2")
    assert train(folder, tmp_path / "a", *flags) == 0
    found = content(tmp_path / "a")
    assert found["architecture"]["in_channels"] == 1
    assert (found["preprocessing"]["mean"], found["preprocessing"]["std"]) == ((0.3,), (0.2,))
    given = ("--checkpoint", str(tmp_path / "a" / "last.pt"))
    capsys.readouterr()
    assert main(["evaluate", *given, "--data-path", str(folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(found["history"][0]["val_loss"], rel=1e-5)
    assert train(folder, tmp_path / "b", *PLAIN, "--in-chans", "1") == 0
    mean = content(tmp_path / "b")["preprocessing"]["mean"]
    assert mean == pytest.approx((np.mean((0.485, 0.456, 0.406)),))
    assert main(["train", *TINY, "--in-chans", "3", "--steps", "1", "--no-progress",
                 "--output-dir", str(tmp_path / "c")]) == 0  # fmt: skip
    assert len(set(content(tmp_path / "c")["preprocessing"]["mean"])) == 1  # of gray digits
    assert train(folder, tmp_path / "d", "--mean", "0.1", "0.2") == 2
    assert "--mean: expected 3 values, one per channel, got 2" in capsys.readouterr().err


def test_patience(
    folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs after the best, and no sooner; a run that is over stays so."""
    accuracies = iter([50.0, 70.0, 60.0, 70.0, 80.0])
    original = loop.validate

    def validate(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        return found._replace(whole={**found.whole, "top1": next(accuracies)})

    monkeypatch.setattr("densenet_fast.train.training.validate", validate)
    flags = ("--workers", "0", "--epochs", "9", "--patience", "2")
    assert train(folder, tmp_path, *flags) == 0
    assert "epoch 1 was the best: stopped by --patience 2" in capsys.readouterr().out
    assert content(tmp_path)["epoch"] == 4 and content(tmp_path, "best.pt")["epoch"] == 2
    assert train(folder, tmp_path, *flags, "--resume", "auto") == 0
    assert content(tmp_path)["epoch"] == 4
    assert train(folder, tmp_path, *flags[:2], "--epochs", "5", "--resume", "auto") == 0
    assert content(tmp_path, "best.pt")["epoch"] == 5


def test_balanced_classes(folder: Path, tmp_path: Path) -> None:
    """Weights N / (classes · images of one), as scikit-learn has them."""
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    for n in (1, 2, 3):
        (images / "train" / "cat" / f"{n}.png").unlink()
    arguments = parsed("--data-path", str(images), "--class-weights", "balanced", "--workers", "0")
    source = open_data(arguments, Processes(), train=True).source
    criterion = setup.criterion(arguments, Multiclass(2), source, torch.device("cpu"))
    assert criterion.weight.tolist() == pytest.approx([7 / (2 * 2), 7 / (2 * 5)])


def test_sizes_of_small_images_in_folders(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    """A DenseNet-BC takes small images of one size as they are, others by their shorter edge."""
    other = write_folder(tmp_path / "other", size=70)
    for images, size, resize in ((folder, 24, None), (other, 64, 64)):
        output = tmp_path / f"out{size}"
        assert train(images, output, "--workers", "0", "--steps", "1") == 0
        kept = content(output)["preprocessing"]
        assert (kept["crop"], kept["resize"]) == (size, resize)
        said = capsys.readouterr().out
        assert f"{images}: {size}×{size} pixels by the images' own sizes" in said
        assert f"training images of {size}×{size} pixels" in said
    flags = ("--workers", "0", "--steps", "1", "--train-crop-size", "32")
    assert train(other, tmp_path / "given", *flags) == 0
    assert content(tmp_path / "given")["preprocessing"]["crop"] == 32  # as in training


def test_own_checkpoint_brings_its_network_and_sizes(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    sizes = ("--train-crop-size", "18", "--val-crop-size", "20", "--interpolation", "bicubic")
    first = tmp_path / "first"
    assert train(folder, first, *PLAIN, *sizes, "--val-resize-size", "22", "--mean", "0.4") == 0
    three = write_folder(tmp_path / "three", ("ant", "bee", "cow"))
    weights = ("--weights", str(first / "last.pt"))
    flags = ("train", "--data-path", str(three), "--output-dir", str(tmp_path / "second"))
    rest = ("--workers", "0", "--batch-size", "4", "--freeze", "features", "--lr", "0.01")
    assert main([*flags, *weights, *rest, "--steps", "1"]) == 0
    before, after = content(first), content(tmp_path / "second")
    assert after["architecture"] == {**before["architecture"], "num_classes": 3}
    assert after["preprocessing"] == before["preprocessing"]
    assert after["arguments"]["train_crop_size"] == 18
    name = "features.conv0.weight"
    assert torch.equal(after["model"][name], before["model"][name])
    # Going on needs the weights no more.
    shutil.move(first / "last.pt", first / "moved.pt")
    assert main([*flags, *weights, *rest, "--epochs", "1", "--resume", "auto"]) == 0
    capsys.readouterr()
    moved = ("--weights", str(first / "moved.pt"))
    assert main([*flags, *moved, "--model", "densenet121"]) == 2
    error = capsys.readouterr().err
    assert "--model densenet121 is not what" in error and "densenet-bc (depth 10, k = 2)" in error
    assert main(["predict", *moved, "--model", "densenet121", "any.png"]) == 2
    assert "is a checkpoint of densenet-fast train: --checkpoint" in capsys.readouterr().err


def test_an_average_near_its_start_decides_nothing(
    folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    """It is said, and the weights themselves are the best and are used."""
    assert train(folder, tmp_path, "--workers", "0", "--epochs", "2", "--model-ema") == 0
    said = capsys.readouterr().out
    assert "with 3 steps an epoch, the average will still be 100 % its first weights" in said
    assert said.count("(still 100 % its first weights: the others decide best.pt)") == 2
    best = content(tmp_path, "best.pt")
    scores = [row["val_top1"] for row in content(tmp_path)["history"]]
    assert best["epoch"] - 1 == scores.index(max(scores))
    assert best["history"][-1]["ema_start"] == 1
    assert_same(dict(load(tmp_path / "best.pt").model.state_dict()), dict(best["model"]))
    given = ("--checkpoint", str(tmp_path / "best.pt"), "--data-path", str(folder), "--json")
    assert main(["evaluate", *given]) == 0
    written = capsys.readouterr()
    assert json.loads(written.out)["top1"] == max(scores)
    assert "the average of the weights is near its start" in written.err
    quick = ("--model-ema-steps", "1", "--model-ema-decay", "0.5")
    assert train(folder, tmp_path / "b", *PLAIN, "--model-ema", *quick) == 0
    assert "first weights" not in capsys.readouterr().out
    best = content(tmp_path / "b", "best.pt")
    assert_same(dict(load(tmp_path / "b" / "best.pt").model.state_dict()), dict(best["ema"]))
