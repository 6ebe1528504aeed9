"""The CUDA kernels as the compiler makes them: its report, and the machine code.

The binaries are kept in a folder for temporary files, under a hash of all that went into them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script does not look there
import setup_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
MACHINE_CODE = (80, 90)  # those whose instructions are looked at
# All of them take many minutes on two cores: where DENSENET_FAST_CUDA=all says so.
ALL = os.environ.get("DENSENET_FAST_CUDA") == "all"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120) if ALL else MACHINE_CODE
# Sources of kernels with products; the others are small.
PRODUCTS = ("conv1x1_forward", "conv1x1_backward", "conv3x3_forward", "conv3x3_backward")
SOURCES = (*PRODUCTS, "transition", "weights", "pointwise", "pooling")
FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-cubin"]


@dataclass(frozen=True)
class Kernel:
    """One entry function for one architecture."""

    mangled: str
    name: str  # without arguments and namespaces: rows_product<HalfPolicy, ...>
    architecture: int
    registers: int
    stack_bytes: int
    spill_bytes: int

    @property
    def template(self) -> str:
        """The kernel's name without template arguments."""
        return self.name.split("<", 1)[0]


def nvcc() -> str:
    """The compiler; skips the test where there is none."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return found


@functools.cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"densenet_fast_compiled_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix="densenet_fast_compiled_"))
    return folder


def _code(architecture: int) -> list[str]:
    """As the module is built: newer binaries come from the PTX of older architectures."""
    chosen = setup_cuda.Architecture(architecture // 10, architecture % 10)
    return setup_cuda.code_flags([chosen])


@functools.cache
def _key(compiler: str, source: str, architecture: int) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + repr([*FLAGS, *_code(architecture)]).encode())
    headers = CSRC / "cuda" / "kernels.h", CSRC / "cuda" / "tiles.h", CSRC / "operators.h"
    for file in [*sorted((CSRC / "cuda").glob("*.cuh")), *headers]:
        digest.update(file.read_bytes())
    digest.update((CSRC / "cuda" / f"{source}.cu").read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def compiled(source: str, architecture: int) -> Path:
    """The binary of one source of csrc/cuda for one architecture; its report is beside it."""
    compiler = nvcc()
    target = _cache() / f"{source}-{_key(compiler, source, architecture)}.cubin"
    with target.with_suffix(".lock").open("w") as lock:  # tests in parallel wait for each other
        fcntl.flock(lock, fcntl.LOCK_EX)
        _compile([compiler, *FLAGS, *_code(architecture)], source, target)
    return target


def _compile(command: list[str], source: str, target: Path) -> None:
    report = target.with_suffix(".txt")
    if target.exists() and report.exists():
        return
    made = target.with_suffix(f".{os.getpid()}.cubin")
    file = CSRC / "cuda" / f"{source}.cu"
    command = [*command, str(file), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report.write_text(done.stderr)
    made.rename(target)


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        pytest.skip("needs c++filt")
    given = "\n".join(names)
    out = subprocess.run([tool], input=given, capture_output=True, text=True, check=True).stdout
    return [_short(line) for line in out.splitlines()]


def _short(name: str) -> str:
    """`void densenet_fast::cuda::f<densenet_fast::cuda::P, 64>(...)` as `f<P, 64>`."""
    name = name.removeprefix("void ").replace("densenet_fast::cuda::", "")
    name = name.replace("(anonymous namespace)::", "")
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:position]
    return name


_ENTRY = re.compile(
    r"Compiling entry function '(?P<mangled>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@functools.cache
def kernels(source: str) -> tuple[Kernel, ...]:
    """What the compiler reports of all kernels in one source."""
    nvcc()  # skips here, which a thread cannot
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(lambda a: compiled(source, a), ARCHITECTURES))
    reports = [binary.with_suffix(".txt").read_text() for binary in binaries]
    entries = [entry for report in reports for entry in _ENTRY.finditer(report)]
    assert entries, "the compiler's report has no kernels"
    names = _demangled([entry["mangled"] for entry in entries])
    return tuple(
        Kernel(
            entry["mangled"],
            name,
            int(entry["arch"]),
            int(entry["registers"]),
            int(entry["stack"]),
            int(entry["stores"]) + int(entry["loads"]),
        )
        for entry, name in zip(entries, names, strict=True)
    )


# ---- Machine code -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    address: int
    text: str


def _tools() -> tuple[str, dict[str, str]]:
    """cuobjdump, and the environment in which it finds nvdisasm; skips where they are not."""
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    folders += [Path("/usr/local/cuda/bin")]
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders.append(Path(site) / "triton" / "backends" / "nvidia" / "bin")
    found = {
        tool: folder
        for tool in ("cuobjdump", "nvdisasm")
        for folder in reversed(folders)
        if (folder / tool).is_file()
    }
    if len(found) < 2:
        pytest.skip("needs cuobjdump and nvdisasm (CUDA's, or those of the triton package)")
    path = os.pathsep.join([str(found["nvdisasm"]), os.environ.get("PATH", "")])
    return str(found["cuobjdump"] / "cuobjdump"), {**os.environ, "PATH": path}


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)


@functools.cache
def machine_code(source: str, architecture: int) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of all kernels of one source, by mangled name."""
    tool, environment = _tools()
    command = [tool, "--dump-sass", str(compiled(source, architecture))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^\s*Function : (\w+)$", done.stdout, flags=re.MULTILINE)
    return {
        name: tuple(Instruction(int(a, 16), text) for a, text in _INSTRUCTION.findall(body))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def loops(code: tuple[Instruction, ...]) -> list[tuple[Instruction, ...]]:
    """What stands between each branch back and its target."""
    found = []
    for instruction in code:
        branch = re.search(r"\bBRA\b.* `?\(?(0x[0-9a-f]+)", instruction.text)
        if branch and int(branch[1], 16) < instruction.address:
            start = int(branch[1], 16)
            found.append(tuple(i for i in code if start <= i.address <= instruction.address))
    return found
