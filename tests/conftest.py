"""What all tests share: the header that says what is being tested, threads, hypothesis' profile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from densenet_fast.build_info import build_info

# Examples differ from run to run on a developer's machine and are always the same ones in CI.
hypothesis.settings.register_profile(
    "densenet_fast", deadline=None, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("densenet_fast")


def pytest_report_header() -> list[str]:
    return [f"densenet_fast {line}" for line in str(build_info()).splitlines()]


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
