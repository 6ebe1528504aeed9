"""Two processes: what they compute together, and what happens when one is lost or never comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")
pytest.importorskip("tensorboard")

from training_runs import TINY, VAL, assert_same, content, train, write_idx

from densenet_fast.train import data, distributed, setup
from densenet_fast.train.arguments import make_parser
from densenet_fast.train.batches import Augmented, Draws, Plain, loader
from densenet_fast.train.command import main
from densenet_fast.train.distributed import Processes
from densenet_fast.train.errors import UsageError
from densenet_fast.train.rules import complete

ROOT = Path(__file__).parents[2]
COMMON = ("--lr", "0.05", "--batch-size", "4", "--epochs", "3", "--seed", "3")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _workers(agent: int) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(child) for child in children.read_text().split()]


def _emulated(folder: Path, epochs: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """DistributedDataParallel's definition in one process: weights, and each epoch's mean loss.

    Every process has its own half of the images and its own batch statistics; gradients are
    averaged, and the first process' running statistics are everybody's.
    """
    arguments = make_parser().parse_args(["train", *TINY, "--data-path", str(folder), *COMMON])
    complete(arguments)
    setting = data.open_data(arguments, Processes(), train=True)
    architecture = setup.architecture_of(arguments, setting.source)
    first, second = (
        setup.make_model(arguments, architecture, torch.device("cpu"), resuming=False)
        for _ in range(2)
    )
    transform = setup.training_transform(arguments, setting, 28)
    images = Augmented(setting.source.train, transform, arguments.seed)
    draws = [Draws(len(images), 4, arguments.seed, Processes(rank, 2)) for rank in range(2)]
    loaders = [loader(images, 0, torch.device("cpu"), batch_sampler=draw) for draw in draws]
    optimizer = torch.optim.SGD(first.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    means = []
    for epoch in range(epochs):
        total = count = 0.0
        for draw in draws:
            draw.epoch = epoch
        for batches in zip(*loaders, strict=True):
            second.load_state_dict(first.state_dict())
            for model, (batch, labels) in zip((first, second), batches, strict=True):
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(batch), labels)
                loss.backward()
                total += loss.item() * len(labels)
                count += len(labels)
            for own, other in zip(first.parameters(), second.parameters(), strict=True):
                assert own.grad is not None and other.grad is not None
                own.grad = own.grad / 2 + other.grad / 2
            optimizer.step()
        means.append(total / count)
    return first.state_dict(), means


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
def test_killed_worker_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    """One worker is killed in the second epoch; what comes out is what two processes compute."""
    folder, output = write_idx(tmp_path / "data"), tmp_path / "output"
    flags = (*TINY, *COMMON, "--data-path", str(folder), "--output-dir", str(output))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--master-port", str(_free_port()), "--monitor-interval", "0.1"),
        *("-m", "densenet_fast.train", *flags, "--resume", "auto", "--print-freq", "1"),
        *("--device", "cpu", "--rendezvous-timeout", "60"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as agent:
        assert agent.stdout is not None
        lines = []
        killed = False
        for line in agent.stdout:
            lines.append(line)
            if not killed and "epoch 1 [1/3]" in line:
                os.kill(_workers(agent.pid)[-1], signal.SIGKILL)
                killed = True
    said = "".join(lines)
    assert killed and agent.returncode == 0, said
    found = content(output)
    assert found["processes"] == 2 and found["epoch"] == 3, said

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have it; others round otherwise
    try:
        weights, losses = _emulated(folder, 3)
    finally:
        torch.set_num_threads(threads)
    assert_same(dict(found["model"]), dict(weights))
    rows = found["history"]
    assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-6)
    # Validation is shared, and every image counts once.
    single = tmp_path / "single"
    flags = ("--resume", str(output / "last.pt"), "--test-only")
    assert train(folder, single, *flags) == 0
    assert not single.exists()


def test_validation_of_several_processes_counts_every_image_once(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "data")
    arguments = make_parser().parse_args(["train", "--data-path", str(folder)])
    setting = data.open_data(arguments, Processes(), train=True)
    parts = [
        Plain(setting.source.val, setting.plain.transform(), Processes(rank, 3))
        for rank in range(3)
    ]
    assert sorted(index for part in parts for index in part.indices) == list(range(VAL))


def test_process_that_never_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(_free_port())
    named = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    folder = write_idx(tmp_path / "data")
    status = train(folder, tmp_path / "out", "--rendezvous-timeout", "1", "--device", "cpu")
    assert status == 2
    error = capsys.readouterr().err
    assert f"not all of 2 processes joined at 127.0.0.1:{port} within 1 s" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE.*'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK below WORLD_SIZE 2, got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "0"},
            "LOCAL_RANK below LOCAL_WORLD_SIZE 0, got 0",
        ),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}, "got -1"),
    ],
)
def test_environment_that_torchrun_would_not_set(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        distributed.from_environment(environment)


def test_single_process_under_torchrun_needs_no_group() -> None:
    found = distributed.from_environment({"WORLD_SIZE": "1", "RANK": "0"})
    assert found == Processes() and found.main


def test_other_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_idx(tmp_path / "data"), tmp_path / "out"
    assert train(folder, output, "--epochs", "1") == 0
    found = content(output)
    torch.save({**found, "processes": 2}, output / "last.pt")
    assert train(folder, output, "--epochs", "2", "--resume", "auto") == 2
    assert "processes: 2 before, 1 now" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(output / "last.pt"), "--data", str(folder)]) == 0
