"""What the flags of `densenet-fast train` do."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from torchvision.tv_tensors import Image
from training_runs import TINY, assert_same, content, train, write_folder, write_idx

import densenet_fast
from densenet_fast.train import batches, loop, networks, optimization, training
from densenet_fast.train.architecture import Architecture
from densenet_fast.train.arguments import AUGMENTATIONS, make_parser
from densenet_fast.train.command import main
from densenet_fast.train.distributed import Processes
from densenet_fast.train.rules import complete
from densenet_fast.train.sources import SOURCES, open_source
from densenet_fast.train.transforms import Augmentation, preprocessing, with_sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idx(tmp_path_factory.mktemp("data") / "idx")


def parsed(*flags: str) -> Namespace:
    arguments = make_parser().parse_args(["train", *TINY, *flags])
    complete(arguments)
    return arguments


SCHEDULES = {
    "steplr": ("--lr-step-size", "3", "--lr-gamma", "0.5"),
    "exponentiallr": ("--lr-gamma", "0.8"),
    "cosineannealinglr": ("--lr-min", "0.01"),
}


@pytest.mark.parametrize("warmup", [None, "constant", "linear"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchvisions(name: str, warmup: str | None) -> None:
    """The rates of PyTorch's schedulers, put together as torchvision's script does."""
    flags = [*SCHEDULES[name], "--lr-scheduler", name, "--lr", "0.4", "--epochs", "12"]
    if warmup is not None:
        flags += ["--lr-warmup-epochs", "4", "--lr-warmup-method", warmup]
        flags += ["--lr-warmup-decay", "0.1"]
    arguments = parsed(*flags)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    kinds = torch.optim.lr_scheduler
    before = 4 if warmup else 0
    main_part: Any = {
        "steplr": lambda: kinds.StepLR(optimizer, 3, 0.5),
        "exponentiallr": lambda: kinds.ExponentialLR(optimizer, 0.8),
        "cosineannealinglr": lambda: kinds.CosineAnnealingLR(optimizer, 12 - before, 0.01),
    }[name]()
    schedule = main_part
    if warmup == "linear":
        first: Any = kinds.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        schedule = kinds.SequentialLR(optimizer, [first, main_part], milestones=[4])
    elif warmup == "constant":
        first = kinds.ConstantLR(optimizer, factor=0.1, total_iters=4)
        schedule = kinds.SequentialLR(optimizer, [first, main_part], milestones=[4])
    factor = optimization.lr_factor(arguments)
    for epoch in range(12):
        assert 0.4 * factor(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_average_of_weights() -> None:
    """torchvision's definition: what an update forgets grows with the images between two."""
    flags = ("--model-ema", "--model-ema-decay", "0.99", "--model-ema-steps", "4", "--epochs", "8")
    model = nn.Linear(2, 2)
    average = optimization.make_average(parsed(*flags, "--batch-size", "2"), model, 3)
    assert average is not None
    start = model.weight.detach().clone()
    average.update_parameters(model)  # the first one copies
    nn.init.ones_(model.weight)
    average.update_parameters(model)
    kept = 1 - (1 - 0.99) * 3 * 2 * 4 / 8
    expected = kept * start + (1 - kept)
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert optimization.make_average(parsed(), model, 1) is None


def test_frozen_features_stay(folder: Path, tmp_path: Path) -> None:
    flags = ("--epochs", "1", "--weight-decay", "0.1")
    torch.manual_seed(0)
    start = Architecture("densenet-bc", 10, 1, depth=10, growth_rate=2).build().state_dict()
    for name, prefix in (("features", "features."), ("features.denseblock2",) * 2):
        output = tmp_path / name
        assert train(folder, output, *flags, "--freeze", name) == 0
        found = content(output)["model"]
        for key, value in found.items():
            if "running" not in key and "num_batches" not in key:
                assert torch.equal(value, start[key]) == key.startswith(prefix), key
    model = Architecture("densenet-bc", 10, 1, depth=10, growth_rate=2).build()
    assert networks.freeze(model, "all-but-classifier") == sum(
        p.numel() for p in model.classifier.parameters()
    )


def test_weights_from_a_file(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What may differ in a file is load_weights' business; its errors end the command."""
    calls: list[dict[str, Any]] = []

    def load_weights(model: nn.Module, path: Path, **named: Any) -> None:
        calls.append(named)
        if path.name == "wrong.pth":
            raise RuntimeError("missing: features.conv0.weight")
        with torch.no_grad():
            model.get_parameter("features.conv0.weight").fill_(0.25)

    monkeypatch.setattr(densenet_fast, "load_weights", load_weights)
    for name in ("right.pth", "wrong.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    freeze = ("--freeze", "features", "--epochs", "1")
    right = ("--weights", str(tmp_path / "right.pth"))
    assert train(folder, tmp_path / "out", *freeze, *right) == 0
    found = content(tmp_path / "out")
    assert torch.all(found["model"]["features.conv0.weight"] == 0.25)
    assert calls == [{"ignore": "classifier.*"}]
    assert train(folder, tmp_path / "out2", "--weights", str(tmp_path / "wrong.pth")) == 2
    assert "missing: features.conv0.weight" in capsys.readouterr().err
    # When training goes on, the weights are those of the checkpoint.
    assert (
        train(folder, tmp_path / "out", *freeze[:2], "--epochs", "2", *right, "--resume", "auto")
        == 0
    )
    assert len(calls) == 2
    own = ("--weights", str(tmp_path / "out" / "last.pt"))
    assert train(folder, tmp_path / "out3", "--steps", "1", *own) == 0
    assert train(folder, tmp_path / "out3", "--test-only", *own) == 0
    assert calls[2:] == [{"ignore": "classifier.*", "entry": "model"}, {"entry": "model"}]


def test_weights_by_name_get_a_new_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    def densenet121(weights: str, **named: Any) -> densenet_fast.EfficientDenseNet:
        assert weights == "IMAGENET1K_V1" and named == {"drop_rate": 0.0}
        torch.manual_seed(3)
        return densenet_fast.EfficientDenseNet(2, (1, 1), 4)

    monkeypatch.setattr(densenet_fast, "densenet121", densenet121)
    own = densenet121("IMAGENET1K_V1", drop_rate=0.0)
    model = networks.pretrained(Architecture("densenet121", 3, 3), "IMAGENET1K_V1", exact=False)
    assert model.classifier.out_features == 3
    assert_same(dict(model.features.state_dict()), dict(own.features.state_dict()))
    with pytest.raises(networks.UsageError, match="1000 classes, expected 3"):
        networks.pretrained(Architecture("densenet121", 3, 3), "IMAGENET1K_V1", exact=True)
    with pytest.raises(networks.UsageError, match="3 channels, the data have 1"):
        networks.pretrained(Architecture("densenet121", 3, 1), "IMAGENET1K_V1", exact=False)


def test_memory_layout_and_compilation_reach_the_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compiled(network: nn.Module) -> nn.Module:
        def look(_: nn.Module, given: tuple[torch.Tensor]) -> None:
            seen.append((given[0].shape, torch.is_autocast_enabled("cpu"), network))

        network.register_forward_pre_hook(look)
        return network

    monkeypatch.setattr(torch, "compile", compiled)
    flags = ("--compile", "--amp", "--channels-last", "--steps", "1", "--train-crop-size", "20")
    budget = ("--checkpoint-mode", "auto", "--memory-budget", "4")
    before = torch.get_num_threads()
    try:
        assert train(folder, tmp_path, *flags, *budget, "--threads", "2") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    (shape, autocast, network), *_ = seen
    assert shape == (4, 1, 20, 20) and autocast
    assert network.checkpoint == "auto" and network.memory_budget == 4 * 2**20
    assert network.features.conv0.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_freed_before_the_forward_plans_a_step() -> None:
    network = densenet_fast.EfficientDenseNet(2, (2,), 4, num_classes=3, small_inputs=True)
    network.memory_budget, network.checkpoint = 2**20, "auto"
    parameters, seen = list(network.parameters()), []
    network.register_forward_pre_hook(lambda *_: seen.append([p.grad for p in parameters]))
    optimizer = torch.optim.SGD(parameters, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    placement = loop.Placement(torch.device("cpu"), torch.contiguous_format, None)
    step = loop.Step(
        network,
        optimizer,
        scaler,
        placement,
        criterion=nn.CrossEntropyLoss(),
        batch_size=2,
        clip=None,
    )
    for _ in range(2):
        step(torch.randn(2, 3, 8, 8), torch.tensor([0, 2]))
    assert seen == [[None] * len(parameters)] * 2
    assert all(parameter.grad is not None for parameter in parameters)


def test_clipping_and_smoothing(folder: Path, tmp_path: Path) -> None:
    """One step with clipped gradients moves as far as they allow; smoothing changes the loss."""
    torch.manual_seed(0)
    start = Architecture("densenet-bc", 10, 1, depth=10, growth_rate=2).build()
    flags = ("--steps", "1", "--clip-grad-norm", "0.01", "--weight-decay", "0")
    assert train(folder, tmp_path / "a", *flags) == 0
    moved = content(tmp_path / "a")["model"]
    squares = sum(
        (moved[name] - value.detach()).square().sum().item()
        for name, value in start.named_parameters()
    )
    assert math.sqrt(squares) == pytest.approx(0.05 * 0.01, rel=1e-3)
    assert train(folder, tmp_path / "b", "--steps", "1", "--label-smoothing", "0.3") == 0
    sums = [
        content(tmp_path / name)["by_process"][0]["meters"]["loss"]["mean_value"]
        for name in ("a", "b")
    ]
    assert sums[0] != sums[1]


@pytest.mark.parametrize("policy", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("deep", [False, True])
def test_augmentation_depends_on_seed_epoch_and_image_alone(
    policy: str, channels: int, deep: bool
) -> None:
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (4, channels, 20, 20), dtype=torch.uint8)
    samples: Any = [(Image(pixels[i] / 255 if deep else pixels[i]), i) for i in range(4)]
    plain = preprocessing(20, (0.5,) * channels, (0.2,) * channels)
    augmentation = Augmentation(16, None, hflip=0.5, policy=policy, erase=0.5)
    transform = augmentation.transform(plain, 20)
    images = batches.Augmented(samples, transform, seed=5)
    before = torch.get_rng_state()
    first = [images[batches.Draw(epoch, 2)][0] for epoch in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = [images[batches.Draw(epoch, 2)][0] for epoch in reversed(range(6))]
    assert_same(first, again[::-1])
    assert first[0].shape == (channels, 16, 16) and first[0].dtype == torch.float32
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_mixed_labels_are_shares() -> None:
    batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 2])
    for mixup, cutmix in ((0.5, 0.0), (0.0, 1.0), (0.5, 1.0)):
        mixing = batches.Mixing(mixup, cutmix, 3, seed=0, rank=0)
        images, labels = mixing(batch, 1, 2)
        assert images.shape == (4, 1, 8, 8) and labels.shape == (4, 3)
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        assert_same((images, labels), mixing(batch, 1, 2))
    unchanged = batches.Mixing(0, 0, 3, seed=0, rank=0)(batch, 1, 2)
    assert unchanged[1] is batch[1]


def test_order_of_images() -> None:
    """Every epoch has all images once, in another order; processes share them; `start` skips."""
    draws = batches.Draws(10, 4, 0, Processes())
    draws.epoch = 1
    order = [draw.image for batch in draws for draw in batch]
    assert sorted(order) == list(range(10)) and [len(b) for b in draws] == [4, 4, 2]
    draws.start = 2
    assert [draw.image for batch in draws for draw in batch] == order[8:]
    draws.start, draws.epoch = 0, 2
    assert [draw.image for batch in draws for draw in batch] != order
    halves = [batches.Draws(10, 4, 0, Processes(rank, 2)) for rank in range(2)]
    parts = [[draw.image for batch in half for draw in batch] for half in halves]
    assert sorted(parts[0] + parts[1]) == list(range(10))


def test_deterministic_algorithms(folder: Path, tmp_path: Path) -> None:
    try:
        flags = ("--use-deterministic-algorithms", "--steps", "2")
        assert train(folder, tmp_path, *flags) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_test_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, tmp_path / "out", "--epochs", "1") == 0
    row = content(tmp_path / "out")["history"][0]
    start = capsys.readouterr().out.splitlines()[0]
    assert start == (
        f"densenet-bc (depth 10, k = 2), 10 classes, 1 channels; {folder}: 22 training images of "
        "28×28 pixels, 10 validation images of 28×28"
    )
    last = ("--resume", str(tmp_path / "out" / "last.pt"))
    assert train(folder, tmp_path / "none", "--test-only", *last, batch_size=10) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"10 images: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %")
    assert not (tmp_path / "none").exists()


def test_fashion_mnist_by_name(folder: Path) -> None:
    source = open_source("fashion-mnist", folder, download=False)
    assert not isinstance(source, Path)
    assert source.classes[9] == "Ankle boot" and source.flip
    assert set(SOURCES) >= {"digits", "cifar10", "cifar100", "mnist", "fashionmnist"}


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_data_sets_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their classes are asked for both parts, fetched once when --download says so."""
    from PIL import Image
    from torchvision import datasets

    asked: list[tuple[bool, bool]] = []

    class Few:
        classes = tuple(f"{n} - name" for n in range(10))

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert root == tmp_path / "root"
            asked.append((train, download))

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Any, int]:
            mode, size = ("RGB", 32) if name == "cifar10" else ("L", 28)
            return Image.new(mode, (size, size), index), index

    monkeypatch.setattr(datasets, {"cifar10": "CIFAR10", "mnist": "MNIST"}[name], Few)
    flags = ("--data", name, "--data-path", str(tmp_path / "root"), "--download", *TINY)
    rest = ("--epochs", "1", "--batch-size", "4", "--output-dir", str(tmp_path / "out"))
    assert main(["train", *flags, *rest]) == 0
    assert asked == [(True, True), (False, True), (True, False), (False, False)]
    found = content(tmp_path / "out")
    assert found["architecture"]["in_channels"] == (3 if name == "cifar10" else 1)
    assert found["classes"] == list(Few.classes)


def test_photographs_are_cut_to_imagenets_sizes() -> None:
    plain = preprocessing(None, (0.5,) * 3, (0.2,) * 3)
    assert (plain.resize, plain.crop) == (256, 224)
    assert plain.transform()(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape == (3, 224, 224)
    larger = with_sizes(plain, parsed("--val-crop-size", "320"))
    assert (larger.resize, larger.crop) == (320, 320)


def test_default_network() -> None:
    from densenet_fast.train.setup import default_model

    parser = make_parser()
    assert default_model(parser.parse_args(["train"])) == "densenet-bc"
    assert default_model(parser.parse_args(["train", "--data-path", "x"])) == "densenet121"
    assert training.AUTO == "auto"


def test_fine_tuning_of_densenet121_on_a_folder(tmp_path: Path) -> None:
    """The documented command, with the weights' place taken by a seed and small crops."""
    images = write_folder(tmp_path / "images", count=1)
    flags = ("--data-path", str(images), "--output-dir", str(tmp_path / "out"), "--workers", "0")
    sizes = ("--train-crop-size", "64", "--val-resize-size", "64", "--val-crop-size", "64")
    recipe = ("--lr", "0.001", "--weight-decay", "0", "--lr-step-size", "7", "--epochs", "1")
    assert main(["train", *flags, *sizes, *recipe, "--batch-size", "2"]) == 0
    found = content(tmp_path / "out")
    assert found["architecture"]["model"] == "densenet121"
    assert found["classes"] == ["cat", "dog"]
