"""Builds kernel sources for the emulator: a shared library for ctypes, or a program.

    library = host_build.load([CSRC / "cuda" / "pooling.cu", HERE / "kernels_api.cpp"])
    library.set_order("random", seed=3)
    EmulatedOps(library).channel_statistics(features, mean, var)

Objects and results are kept in a folder for temporary files, under a hash of what went into them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from emulated_library import Library

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
INCLUDE = HERE / "include"
FORCED = INCLUDE / "emulator.h"
API = HERE / "emulator_api.cpp"
ACCESS_CHECKS = HERE / "access_checks.cpp"

FLAGS = [
    *("-std=c++20", "-g1", "-fPIC", "-fno-gnu-unique", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas"),
    "-DDENSENET_FAST_EMULATOR",
]


class Patch(NamedTuple):
    """A deliberate fault: `old`, which `file` (relative to csrc) has once, becomes `new`."""

    file: str
    old: str
    new: str


# ---- What the machine has -----------------------------------------------------------------------


def _compiler() -> list[str]:
    if platform.system() != "Linux":
        pytest.skip("the emulator needs Linux")
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs a C++ compiler ({command[0]} was not found; CXX names another)")
    return command


@functools.cache
def _compiler_version(command: tuple[str, ...]) -> str:
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=True
    ).stdout


def _cuda_include_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "include"
    yield Path("/usr/local/cuda/include")
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1] / "include"
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        yield from sorted(Path(site).glob("nvidia/cu[0-9]*/include"), reverse=True)
        yield Path(site) / "nvidia" / "cuda_runtime" / "include"
        yield Path(site) / "triton" / "backends" / "nvidia" / "include"


@functools.cache
def _find_cuda_include() -> Path | None:
    needed = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")
    for folder in _cuda_include_candidates():
        if all((folder / name).is_file() for name in needed):
            return folder
    return None


def cuda_include() -> Path:
    """The folder of CUDA's headers; skips the test where there is none."""
    folder = _find_cuda_include()
    if folder is None:
        pytest.skip("needs CUDA's headers (CUDA_HOME, /usr/local/cuda, nvcc or the nvidia wheels)")
    return folder


# ---- Building -----------------------------------------------------------------------------------


@functools.cache
def _cache() -> Path:
    named = os.environ.get("DENSENET_FAST_EMULATOR_CACHE")
    folder = Path(named or Path(tempfile.gettempdir()) / f"densenet_fast_emulator_{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or (not named and stat.S_IMODE(status.st_mode) & 0o077):
        return Path(tempfile.mkdtemp(prefix="densenet_fast_emulator_"))
    for file in folder.iterdir():  # what nobody has used for a week
        if time.time() - file.stat().st_mtime > 7 * 24 * 3600:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    return folder


@contextmanager
def _alone() -> Iterator[None]:
    """One process builds at a time: tests in parallel then wait for each other's results."""
    with (_cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def _local_files(source: Path, folders: Sequence[Path]) -> list[Path]:
    """`source` and all that it includes from the repository."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found[file] = None
        for name in _INCLUDE.findall(file.read_text()):
            for folder in (file.parent, *folders):
                if (folder / name).is_file():
                    waiting.append((folder / name).resolve())
                    break
    return list(found)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def _patched(patches: Sequence[Patch]) -> Path:
    """A copy of csrc with `patches` applied."""
    texts: dict[str, str] = {}
    for file, old, new in patches:
        text = texts.get(file) or (CSRC / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"csrc/{file} has {text.count(old)} times, not once: {old!r}")
        texts[file] = text.replace(old, new)
    files = [f for f in sorted(CSRC.rglob("*")) if f.is_file()]
    key = _hash(repr(sorted(texts.items())), *(f.read_bytes() for f in files))
    folder = _cache() / f"csrc-{key}"
    if not folder.exists():
        copy = Path(tempfile.mkdtemp(dir=_cache()))
        shutil.copytree(CSRC, copy / "csrc")
        for file, text in texts.items():
            (copy / "csrc" / file).write_text(text)
        _move(copy / "csrc", folder)
        shutil.rmtree(copy)
    return folder


def _move(made: Path, to: Path) -> None:
    try:
        made.rename(to)
    except OSError:  # somebody else was faster
        if not to.exists():
            raise


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        text = "\n".join(errors[:20]) or done.stderr[-4000:]
        raise RuntimeError(f"{shlex.join(command)}\n{text}")


def _precompiled(cxx: Sequence[str], flags: Sequence[str]) -> Path:
    """A header that includes the forced one; g++ takes what is compiled beside it instead."""
    version = _compiler_version(tuple(cxx))
    if "clang" in version:
        return FORCED
    files = sorted(_local_files(FORCED, [INCLUDE]))
    key = _hash(version, repr([*cxx, *flags, FORCED]), *(f.read_bytes() for f in files))
    header = _cache() / f"forced-{key}" / FORCED.name
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        header.parent.mkdir(exist_ok=True)
        header.write_text(f'#include "{FORCED}"\n')
        made = header.with_suffix(f".{os.getpid()}.gch")
        _run([*cxx, *flags, "-x", "c++-header", str(header), "-o", str(made)])
        made.rename(compiled)
    os.utime(header.parent)
    return header


def build(
    sources: Sequence[Path],
    *,
    program: bool = False,
    defines: Sequence[str] = (),
    sanitize: Sequence[str] = (),
    check_accesses: bool = False,
    patches: Sequence[Patch] = (),
    flags: Sequence[str] = (),
    include: Sequence[Path] = (),
    link: Sequence[str] = (),
    optimize: str = "-O2",
) -> Path:
    """Builds `sources` (of csrc or of the tests) with the emulator and returns the file.

    `sanitize` names sanitizers ("address", "undefined"). `check_accesses` has every load and store
    checked: initialised, free of races, inside the named buffers. `patches` apply to a copy of
    csrc.
    """
    cxx = _compiler()
    cuda = cuda_include()
    csrc = _patched(patches) if patches else CSRC
    if check_accesses and sanitize:
        raise ValueError("access checks and sanitizers exclude each other")
    sources = [s.resolve() for s in sources]
    sources = [csrc / s.relative_to(CSRC) if s.is_relative_to(CSRC) else s for s in sources]
    folders = [csrc, csrc / "cuda", INCLUDE, HERE, *include]
    common = [*FLAGS, optimize, *(f"-D{d}" for d in defines), *flags]
    if platform.machine() == "x86_64" and "clang" not in _compiler_version(tuple(cxx)):
        # Fast thread-local variables in a library, without a claim on the little static space.
        common.append("-mtls-dialect=gnu2")
    sanitizing = []
    if sanitize:
        sanitizing = [f"-fsanitize={','.join(sanitize)}", "-fno-sanitize-recover=all"]
        common += [*sanitizing, "-fno-omit-frame-pointer"]
    if check_accesses:
        common += ["-DDENSENET_FAST_CHECK_ACCESSES"]

    def compile_one(source: Path) -> Path:
        own = [*common]
        if check_accesses and source != ACCESS_CHECKS:
            own += ["-fsanitize=thread", "-Wno-tsan"]
        files = [*_local_files(source, folders), *_local_files(FORCED, folders)]
        key = _hash(
            _compiler_version(tuple(cxx)),
            repr([*cxx, *own, cuda, source.name]),
            *(f.name + "\n" + f.read_text() for f in sorted(files, key=lambda f: f.name)),
        )
        target = _cache() / f"{source.stem}-{key}.o"
        if target.exists():
            os.utime(target)
            return target
        made = target.with_suffix(f".{os.getpid()}.o")
        _run(
            [
                *(*cxx, "-x", "c++", *own, "-include", str(forced)),
                *(f"-I{f}" for f in folders),
                *("-isystem", str(cuda), "-c", str(source), "-o", str(made)),
            ]
        )
        made.rename(target)
        return target

    if not program:
        sources.append(API)
    if check_accesses:
        sources.append(ACCESS_CHECKS)
    linking = [*sanitizing, "-pthread", *link]
    if not program:
        linking = ["-shared", *linking]
    with _alone():
        forced = FORCED
        if len(sources) > 3:  # parsing it takes a second of every source
            forced = _precompiled(cxx, [*common, "-isystem", str(cuda)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(o) for o in pool.map(compile_one, sources)]
        key = _hash(repr([*objects, *cxx, *linking]))
        target = _cache() / f"{'program' if program else 'library'}-{key}{'' if program else '.so'}"
        if target.exists():
            os.utime(target)
            return target
        made = target.with_name(f"{os.getpid()}-{target.name}")
        _run([*cxx, *objects, *linking, "-lrt", "-o", str(made)])
        made.rename(target)
    return target


def supports(sanitizer: str) -> bool:
    """Whether programs under `sanitizer` build and run here."""
    return _supports(tuple(_compiler()), sanitizer)


@functools.cache
def _supports(cxx: tuple[str, ...], sanitizer: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text("int main() {}\n")
        command = [*cxx, f"-fsanitize={sanitizer}", str(source), "-o", str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        return subprocess.run([str(target)], capture_output=True, check=False).returncode == 0


def sanitized_environment() -> dict[str, str]:
    """The environment of a Python process that can load libraries built with "address"."""
    found = [
        subprocess.run(
            [*_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def load(sources: Sequence[Path], **options: Any) -> Library:
    """Builds a shared library, as `build` does, and loads it."""
    return Library(build(sources, **options))
