"""The emulated kernels, built once for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dispatched import Run, build_dispatch, serving
from emulation import SM_80, Emulator, emulate

from densenet_fast.operators import extension

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs all kernels, whose build alone takes a minute, is slow."""
    for item in items:
        if HERE in item.path.parents:
            if {"built_emulator", "run"}.intersection(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def built_emulator() -> Emulator:
    return emulate()


@pytest.fixture
def emulator(built_emulator: Emulator) -> Iterator[Emulator]:
    """The emulated kernels under the usual schedule and device."""
    built_emulator.schedule()
    built_emulator.use(SM_80)
    yield built_emulator
    built_emulator.schedule()
    built_emulator.use(SM_80)


@pytest.fixture(scope="session")
def library() -> Path:
    """What replaces the operators' CPU kernels in the processes of `run`."""
    if not extension.LOADED:
        pytest.skip("needs the schemas of the compiled module")
    return build_dispatch()


@pytest.fixture(scope="session")
def run(library: Path) -> Iterator[Run]:
    """Runs code in a process whose operators are the emulated kernels; returns what it prints."""
    with serving(library) as function:
        yield function
