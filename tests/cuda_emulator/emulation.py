"""The emulated kernels of csrc/cuda with their settings: the order of threads and the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host_build
from emulated_ops import EmulatedOps

SOURCES = [*sorted((host_build.CSRC / "cuda").glob("*.cu")), host_build.HERE / "kernels_api.cpp"]
TURING = "DENSENET_FAST_EMULATED_ARCHITECTURE=750"


@dataclass(frozen=True)
class Device:
    """What launchers read of a device."""

    major: int
    minor: int
    shared_bytes_per_block: int
    shared_bytes_per_multiprocessor: int
    multiprocessors: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM_75 = Device(7, 5, 64 << 10, 64 << 10, 72)
SM_80 = Device(8, 0, 163 << 10, 164 << 10, 108)
DEVICES = {
    "sm_86": Device(8, 6, 99 << 10, 100 << 10, 84),
    "sm_90": Device(9, 0, 227 << 10, 228 << 10, 132),
    "64 KB": Device(8, 0, 64 << 10, 64 << 10, 72),
    "one multiprocessor": Device(8, 6, 99 << 10, 100 << 10, 1),
    "three multiprocessors": Device(8, 0, 163 << 10, 164 << 10, 3),
}


class Emulator:
    """The emulated operators, and the settings they run under."""

    def __init__(self, path: Path) -> None:
        """Load a library built from `SOURCES`."""
        self.library = host_build.Library(path)
        self.ops = EmulatedOps(self.library.cdll)

    def schedule(self, order: str = "forward", seed: int = 0) -> None:
        """Run threads and blocks in this order from now on."""
        self.library.set_order(order, seed)

    def use(self, device: Device) -> None:
        """Be this device from now on."""
        self.library.set_device(*vars(device).values())

    @contextmanager
    def on(self, device: Device) -> Iterator[None]:
        """Be this device inside a `with` block."""
        self.use(device)
        try:
            yield
        finally:
            self.use(SM_80)

    def launches(self, run: Callable[[], Any]) -> int:
        """How many kernels `run` launches."""
        self.library.reset_counts()
        run()
        return self.library.counts.launches


def build_kernels(*, optimize: str = "-O1", **options: Any) -> Path:
    """The library of all kernels; `options` are those of `host_build.build`."""
    return host_build.build(SOURCES, optimize=optimize, **options)


def emulate(defines: Sequence[str] = (), **options: Any) -> Emulator:
    """Build and load the kernels."""
    return Emulator(build_kernels(defines=defines, **options))
