"""The emulated kernels, built once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulation import SM_80, Emulator, emulate


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
