"""A shared library of emulated kernels, and the emulator under them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


class EmulatorError(RuntimeError):
    """A launch ended with an error; the text says which kernel, block and thread, and why."""


class Counts(NamedTuple):
    """Of all launches since the last reset. An arrival is one thread at one collective."""

    launches: int
    blocks: int
    arrivals: int


class Library:
    """A shared library with kernels, their C entry points and the emulator under them.

    Entry points are attributes, as of a `ctypes.CDLL`; `call` raises their error text.
    """

    def __init__(self, path: Path) -> None:
        """Load the library that `build` made."""
        self.path = path
        self.cdll = ctypes.CDLL(str(path))
        for name in ("set_order", "register_range", "last_error"):
            getattr(self.cdll, f"emulator_{name}").restype = ctypes.c_char_p

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cdll, name)

    def call(self, name: str, *arguments: object) -> None:
        """Calls an entry point that returns null or the text of an error."""
        function = getattr(self.cdll, name)
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        if error is not None:
            raise EmulatorError(error.decode())

    def set_order(self, order: str, seed: int = 0) -> None:
        """The order of threads and blocks: "forward", "reverse" or "random"."""
        self.call("emulator_set_order", order.encode(), ctypes.c_uint64(seed))

    def set_device(
        self,
        major: int = 8,
        minor: int = 0,
        shared_bytes_per_block: int = 163 * 1024,
        shared_bytes_per_multiprocessor: int = 164 * 1024,
        multiprocessors: int = 108,
    ) -> None:
        """The device that launchers see; an A100 unless told."""
        self.cdll.emulator_set_device(
            major,
            minor,
            shared_bytes_per_block,
            shared_bytes_per_multiprocessor,
            multiprocessors,
        )

    def set_limits(
        self, arrivals_per_block: int = 1 << 30, seconds_without_arrival: float = 10
    ) -> None:
        """When a kernel that goes on and on is ended with an error."""
        self.cdll.emulator_set_limits(
            ctypes.c_uint64(arrivals_per_block), ctypes.c_double(seconds_without_arrival)
        )

    @contextmanager
    def buffers(self, **tensors: Tensor) -> Iterator[None]:
        """Kernels may touch the memory of these tensors (their elements, gaps included) only."""
        for name, tensor in tensors.items():
            span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = span * tensor.element_size() if tensor.numel() else 0
            address = ctypes.c_void_p(tensor.data_ptr())
            self.call("emulator_register_range", address, ctypes.c_uint64(size), name.encode())
        try:
            yield
        finally:
            self.cdll.emulator_clear_ranges()

    @property
    def last_error(self) -> str:
        """The error text of the last call; empty after a success."""
        text: bytes = self.cdll.emulator_last_error()
        return text.decode()

    @property
    def counts(self) -> Counts:
        """Launches, blocks and arrivals since the last reset."""
        result = (ctypes.c_uint64 * 3)()
        self.cdll.emulator_counts(result)
        return Counts(*result)

    def reset_counts(self) -> None:
        """Starts counting from zero."""
        self.cdll.emulator_reset_counts()
