"""What all tests share: the header that says what is being tested, threads, hypothesis' profile."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack

# Threads that wait for each other sleep: tests in parallel share the processors, which waiting in
# a loop would keep from who is waited for. Read when PyTorch is loaded.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import hypothesis
import pytest
import torch
from devices import BACKENDS, CUDA, on
from forks import Forks, forking

from benchmarks import children
from densenet_fast.build_info import build_info
from densenet_fast.operators import cuda_device

# Examples differ from run to run on a developer's machine and are always the same ones in CI.
hypothesis.settings.register_profile(
    "densenet_fast", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("densenet_fast")

# Tests in parallel share the processors: more threads than those wait for each other, spinning.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _WORKERS))


def pytest_configure(config: pytest.Config) -> None:
    """Files in parallel (`--dist loadfile`) in order: those with the fewest tests take longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All that is imported and collected stays: collections of garbage need not look at it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_report_header() -> list[str]:
    return [f"densenet_fast {line}" for line in str(build_info()).splitlines()]


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every backend, with its cases on the backend's device."""
    with on(request.param):
        yield request.param


@pytest.fixture(params=["auto", CUDA], ids=["cpu", "cuda"])
def everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test of whole networks on the CPU and on a GPU."""
    with on(request.param):
        yield


@pytest.fixture(scope="session")
def importing_once() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`children.ended` in forks of one process for each environment."""
    servers: dict[frozenset[tuple[str, str]], Forks] = {}
    with ExitStack() as stack:

        def ended(
            request: str, environment: Mapping[str, str], timeout: float
        ) -> subprocess.CompletedProcess[str]:
            key = frozenset(environment.items())
            if key not in servers:
                server = forking("import pytest, benchmarks.peers", {**os.environ, **environment})
                servers[key] = stack.enter_context(server)
            code = f"import sys; sys.argv[1:] = [{request!r}]; {children.BOOTSTRAP}"
            done = servers[key](code)
            return subprocess.CompletedProcess([], done.status, done.printed, done.errors)

        yield ended


@pytest.fixture
def forked_children(
    importing_once: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Measures in children that need not import what they need."""
    monkeypatch.setattr(children, "ended", importing_once)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Runs the test without graphs of others, and leaves none."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    obstacle = cuda_device.obstacle()
    if obstacle is not None:
        skip = pytest.mark.skip(reason=f"needs a CUDA device and the CUDA kernels: {obstacle}")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)
