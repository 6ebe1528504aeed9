"""How many blocks of a kernel a multiprocessor holds: registers, shared memory and threads."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compiled import CSRC, PRODUCTS, Kernel, kernels, nvcc

HERE = Path(__file__).resolve().parent
REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes from every block


@dataclass(frozen=True)
class Multiprocessor:
    """What CUDA's programming guide says of a compute capability, and whose code it runs here."""

    architecture: int
    warps: int
    shared_bytes: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(80, 64, 164 << 10),
    "sm_86": Multiprocessor(80, 48, 100 << 10),
    "sm_90": Multiprocessor(90, 64, 228 << 10),
}


class Choice(NamedTuple):
    """A kernel's launch on one device."""

    kernel: str
    device: str
    threads: int
    shared_bytes: int
    stages: int


class Occupancy(NamedTuple):
    """A kernel on one device."""

    choice: Choice
    registers: int
    blocks: int

    @property
    def warps(self) -> int:
        return self.blocks * (self.choice.threads // 32)

    def row(self) -> str:
        """As a row of a Markdown table."""
        c = self.choice
        shared = f"{c.shared_bytes / 1024:.1f}"
        return (
            f"| {c.kernel} | {c.device} | {self.registers} | {c.stages} | {shared} | "
            f"{self.blocks} | {self.warps} |"
        )


@functools.cache
def program(folder: Path, name: str) -> Path:
    """A program of this folder's that asks the launchers' own functions, made in `folder`."""
    made = folder / name
    command = [nvcc(), "-std=c++17", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-arch=sm_80"]
    subprocess.run([*command, str(HERE / f"{name}.cu"), "-o", str(made)], check=True)
    return made


def _printed(folder: Path, name: str) -> list[list[str]]:
    command = [str(program(folder, name))]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split("\t") for line in out.splitlines()]


@functools.cache
def choices(folder: Path) -> tuple[Choice, ...]:
    """Every product's launch on every device, as the launchers choose it."""
    printed = _printed(folder, "launch_choices")
    return tuple(Choice(kernel, device, *map(int, n)) for kernel, device, *n in printed)


class Access(NamedTuple):
    """A warp's access to shared memory."""

    name: str
    wavefronts: int
    ideal: int


def accesses(folder: Path) -> list[Access]:
    """Those whose maps are made to have no bank conflicts."""
    return [Access(name, *map(int, numbers)) for name, *numbers in _printed(folder, "banks")]


def product_kernels() -> list[Kernel]:
    """All kernels with products."""
    every = [k for source in (*PRODUCTS, "transition") for k in kernels(source)]
    return [k for k in every if k.template.endswith("_product")]


def blocks(registers: int, threads: int, shared_bytes: int, device: Multiprocessor) -> int:
    """Resident blocks: registers come by warps in units of 256, shared memory with a reserve."""
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    by_shared = device.shared_bytes // (shared_bytes + RESERVED)
    return min(by_registers, by_shared, device.warps // warps)


def occupancies(folder: Path) -> list[Occupancy]:
    """Every product kernel on every device."""
    registers = {(k.name, k.architecture): k.registers for k in product_kernels()}
    found = []
    for choice in choices(folder):
        if choice.device not in MULTIPROCESSORS:
            continue
        device = MULTIPROCESSORS[choice.device]
        count = registers[choice.kernel, device.architecture]
        resident = blocks(count, choice.threads, choice.shared_bytes, device)
        found.append(Occupancy(choice, count, resident))
    return found
