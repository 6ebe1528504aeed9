"""A first run on a GPU, tried on the CPU: its cases with the smallest shapes, and its processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import compute_sanitizer
import first_run
import first_run_cases
import first_run_page
import pytest
import torch
from comparison import assert_close
from test_kernels_orders import PRODUCTS
from torch import nn
from torchvision.models.densenet import DenseNet

# All that the page asks for must be there: PyTorch, pytest and hypothesis. These are not.
ABSENT = ("torchvision", "numpy", "matplotlib", "tqdm", "sklearn", "PIL", "pytest_benchmark")


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(first_run.HERE / "first_run.sh"), str(folder), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 4, 5, 6])
def test_every_case_on_the_cpu(tmp_path: Path, part: int) -> None:
    """Without the packages that such a machine may not have."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    folder, only = tmp_path / "results", ["--device", "cpu", "--tiny", "--only", str(part)]
    done = run(folder, *only, PYTHONPATH=str(tmp_path))
    log = (folder / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    found = first_run.Results(folder).of(part)
    assert len(found) >= {1: 66, 2: 19, 4: 15, 5: 20, 6: 2}[part]
    page = (folder / "first_run.md").read_text()
    assert f"{len(found)} cases, 0 failed." in page
    assert "the project's own naive network" in page
    columns = {2: "torchvision | ours", 4: "peak, MiB", 5: "lost, ms a step", 6: "host operation"}
    assert columns.get(part, "") in page
    assert {file.name for file in folder.iterdir()} == {"results.jsonl", "log.txt", "first_run.md"}


@pytest.mark.slow
def test_without_a_gpu_every_failure_is_in_the_page(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(tmp_path, "--only", "3", "--only", "6").returncode == 1
    page = (tmp_path / "first_run.md").read_text()
    for line in ("- memcheck: `exit status 1", "- racecheck: `exit", "- the part: `"):
        assert line in page
    log = (tmp_path / "log.txt").read_text()
    assert "cannot run here" in log or "compute-sanitizer was found neither" in log


# One case kills its process, one leaves the GPU unusable, one fails, one takes for ever.
CHILD = """
import json, os, sys, time
folder, _, part = sys.argv[1:4]
file = open(folder + "/results.jsonl", "a+")
file.seek(0)
begun = {json.loads(line)["case"] for line in file}
def add(case, **figures):
    print(json.dumps({"part": int(part), "case": case, **figures}), file=file, flush=True)
for case in ("fine", "killed", "lost", "wrong", "endless", "never"):
    if case not in begun:
        add(case, begun=True)
        case == "killed" and os.abort()
        case == "endless" and time.sleep(600)
        add(case, error={"wrong": "no | good", "lost": "illegal access"}.get(case), took=1)
        case == "lost" and sys.exit(3)
"""


def test_what_fails_keeps_nothing_else_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, folder = tmp_path / "child.py", tmp_path / "results"
    script.write_text(CHILD)
    monkeypatch.setattr(first_run, "__file__", str(script))
    limits = {**first_run.PARTS, 1: first_run.Part("Operators", 5.0)}
    monkeypatch.setattr(first_run, "PARTS", limits)
    folder.mkdir()
    results = first_run.Results(folder)
    results.add(1, "of an earlier run", error="old")
    results.add(2, "another part", took=1)
    begin = time.monotonic()
    assert first_run.main([str(folder), "--only", "1"]) == 1
    assert time.monotonic() - begin < 60
    assert first_run_page.failed(results.of(1)) == {
        "killed": "not finished",
        "lost": "illegal access",
        "wrong": "no | good",
        "endless": "not finished",
        "the part": "ran out of time",
    }
    assert results.of(1)["fine"]["took"] == 1
    assert "another part" in results.of(2)
    page = (folder / "first_run.md").read_text()
    assert "- wrong: `no / good`" in page
    assert "6 cases, 5 failed." in page


def test_page_of_measured_figures() -> None:
    kernel = {"case": "k", "kernel": "conv1x1_forward", "shape": "s", "type": "tf32", "times": 2}
    kernel |= {
        "flops": 10**9,
        "moved": 10**6,
        "seconds": 3e-3,
        "kernels": [["product<P>", 1, 2e-3]],
    }
    device = {"case": "d", "bandwidth": 1e9, "rates": {"tf32": 1e12}}
    step = {"case": "s", "network": "n", "precision": "tf32", "peer": "ours-none"}
    step |= {"peak": 2**21, "seconds": [0.1, 0.3, 0.2], "graph_seconds": [0.1], "graph_pool": 2**20}
    page = first_run_page.page({"A": {}, "B": {e["case"]: e for e in (kernel, device, step)}})
    assert "| n | tf32 | ours-none | 2 | 200 (100) | 100 (100) | 1 |" in page
    # 2 ms for what takes 1 at least, in two layers.
    assert "conv1x1_forward, s, tf32 | 2000 | 3000 | 1000 | 0.5 (50%) | 0.5 (50%) | 2.00 |" in page


@pytest.mark.slow
def test_the_sanitizer_sees_every_product_in_two_types() -> None:
    command = compute_sanitizer.command("", "memcheck", ["-k", first_run.SANITIZED])
    pytest = [*command[command.index(sys.executable) :], "--collect-only"]
    done = subprocess.run(pytest, cwd=first_run.ROOT, capture_output=True, text=True, check=True)
    for name in PRODUCTS:
        for kind in ("bfloat16", "tf32"):
            assert f"[{name}-dense-{kind}]" in done.stdout


@pytest.mark.slow
def test_the_naive_network_is_torchvisions() -> None:
    """The same names, and with the same parameters the same outputs and gradients."""
    code = """
import io, sys, torch
sys.path[:0] = sys.argv[1:]
import naive_torchvision as naive
naive.install()
torch.manual_seed(0)
shape = dict(growth_rate=4, block_config=(2, 3), num_init_features=6, bn_size=2, num_classes=5)
state = torch.load(io.BytesIO(sys.stdin.buffer.read()))
found = []
for efficient in (False, True):
    network = naive.DenseNet(**shape, memory_efficient=efficient).double()
    network.load_state_dict(state["state"])
    output = network(state["images"].requires_grad_())
    output.square().sum().backward()
    found.append([output.detach(), *(p.grad for p in network.parameters())])
torch.save(found, sys.stdout.buffer)
"""
    shape = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6, "bn_size": 2}
    network: nn.Module = DenseNet(**shape, num_classes=5).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    given = io.BytesIO()
    torch.save({"state": network.state_dict(), "images": images}, given)
    folders = [str(first_run.HERE), str(first_run.ROOT)]
    command = [sys.executable, "-c", code, *folders]
    done = subprocess.run(command, input=given.getvalue(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    output = network(images)
    output.square().sum().backward()
    expected = [output.detach(), *(p.grad for p in network.parameters())]
    for found in torch.load(io.BytesIO(done.stdout)):
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two, "naive")


def test_names_of_kernels() -> None:
    name = (
        "void densenet_fast::cuda::rows_product<densenet_fast::cuda::HalfPolicy, "
        "densenet_fast::cuda::MaskedGradient<(densenet_fast::cuda::Into)0>, 128>(int, long)"
    )
    assert first_run_cases._short(name) == "rows_product<HalfPolicy, MaskedGradient<0>, 128>"
    name = "void (anonymous namespace)::softmax<(bool)1, float>(float*)"
    assert first_run_cases._short(name) == "softmax<1, float>"
