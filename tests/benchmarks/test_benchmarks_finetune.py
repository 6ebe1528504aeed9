"""Fine-tuning: classes are halved, all start from the file's weights, and the page says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, memory
from benchmarks.datasets import Images
from benchmarks.networks import NetworkSpec, imagenet
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.suites import finetune

TINY = replace(
    imagenet(10, 4, (1, 2)), num_init_features=8, image_size=40, batch_size=8, num_classes=5
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(classes: int = 5) -> NetworkSpec:
        return replace(TINY, num_classes=classes)

    monkeypatch.setattr(finetune, "_spec", spec)


def images(count: int = 20) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, 32, 32, generator=generator)
    labels = torch.arange(count) % 10
    return Images(pixels, labels, pixels[:10], labels[:10])


def test_classes_are_halved() -> None:
    whole = images()
    first, later = (finetune.part_of(whole, later=later) for later in (False, True))
    assert first.train_labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert later.train_labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert torch.equal(later.train_images[0], whole.train_images[5])
    assert torch.equal(first.test_images, whole.test_images[:5])


def test_everything_but_the_classifier_comes_from_the_file(tmp_path: Path) -> None:
    made = build(PEERS["naive"], TINY, initial_state(TINY, 3), device=torch.device("cpu"))
    file = tmp_path / "weights.pth"
    torch.save(made.state_dict(), file)
    state = finetune.new_classifier(file, seed=0)
    fresh = initial_state(TINY, 1)
    assert state.keys() == made.state_dict().keys()
    for key, value in made.state_dict().items():
        expected = fresh[key] if key.startswith("classifier.") else value
        assert torch.equal(state[key], expected), key


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_suite_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def child(case: memory.MemoryCase) -> dict[str, int]:
        measured.append(case.peer)
        return {finetune.page.__globals__["PEAK"]: len(measured) * 2**20}

    monkeypatch.setattr(finetune, "figures_in_child", child)
    command = ["finetune", "--rounds", "3", "--output", str(tmp_path), "--no-progress"]
    assert cli.main(command) == 0
    record = json.loads((tmp_path / "finetune.json").read_text())
    assert record["complete"]
    assert [len(entry["losses"]) for entry in record["training"]] == [3, 3, 3]
    naive, *others = (entry["losses"] for entry in record["training"])
    for losses in others:  # the same weights, batches and recipe
        torch.testing.assert_close(losses, naive, rtol=1e-3, atol=1e-3)
    assert (tmp_path / finetune.WEIGHTS).is_file()
    text = (tmp_path / "finetune.md").read_text()
    assert "torchvision after densenet_fast.convert" in text and "3.0 " in text
    assert (tmp_path / "finetune.png").exists()

    record["training"][1]["seconds"].pop()
    del record["training"][1]["test_loss"], record["memory"][2]
    (tmp_path / "finetune.json").write_text(json.dumps(record))
    measured.clear()
    assert cli.main([*command, "--resume"]) == 0
    after = json.loads((tmp_path / "finetune.json").read_text())
    assert measured == ["ours-bottleneck"]
    assert after["pretraining"] == record["pretraining"]
    assert len(after["training"]) == 3


def test_a_lost_weights_file_is_made_again(tmp_path: Path) -> None:
    command = ["finetune", "--rounds", "1", "--parts", "training", "--output", str(tmp_path)]
    assert cli.main([*command, "--no-progress"]) == 0
    path = tmp_path / "finetune.json"
    record = json.loads(path.read_text())
    record["training"] = []
    path.write_text(json.dumps(record))
    (tmp_path / finetune.WEIGHTS).unlink()
    assert cli.main([*command, "--no-progress", "--resume"]) == 0
    assert (tmp_path / finetune.WEIGHTS).is_file()
    assert len(json.loads(path.read_text())["training"]) == 3


def test_missing_data_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["finetune", "--data", str(tmp_path / "none"), "--output", str(tmp_path)])
    assert "no such folder" in capsys.readouterr().err


def test_data_of_too_few_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = images(200)
    lacking = replace(whole, train_labels=whole.train_labels % 5)
    monkeypatch.setattr(finetune, "load_images", lambda data, seed: lacking)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["finetune", "--output", str(tmp_path)])
    said = "at least 32 training images and one test image with labels 5 and above, got 0 and 5"
    assert said in capsys.readouterr().err
