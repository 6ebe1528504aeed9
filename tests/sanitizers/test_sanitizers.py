"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

X86 = platform.machine().lower() in {"x86_64", "amd64"}
ARM = platform.machine().lower() in {"aarch64", "arm64"}
# Instruction sets and their flags, as in setup.py.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if X86:
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"]
    ISA_FLAGS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": [*avx512, "-mprefer-vector-width=512"],
    }
elif ARM:
    ISA_FLAGS |= {"neon": []}

FLAGS = [
    *("-std=c++20", "-Og", "-g1", "-fno-omit-frame-pointer", "-pthread", f"-I{CSRC}"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *(f"-DDENSENET_FAST_HAVE_{isa.upper()}=1" for isa in ISA_FLAGS),
]


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs a C++ compiler ({command[0]} was not found; CXX names another)")
    return command


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def supports(cxx: list[str], flags: list[str], folder: Path) -> bool:
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() {}\n")
    built = run([*cxx, *flags, str(source), "-o", str(program)])
    return built.returncode == 0 and run([str(program)]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "cases"),
    # Races need several tasks, not odd sizes, and ThreadSanitizer is slow: no chosen shapes for it.
    [("address,undefined", ["12", "chosen"]), ("thread", ["3"])],
    ids=["address,undefined", "thread"],
)
def test_kernels(sanitizers: str, cases: list[str], tmp_path: Path):
    cxx = compiler()
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    if not supports(cxx, sanitize, tmp_path):
        pytest.skip(f"{cxx[0]} does not build or run programs with {sanitize[0]}")

    sources = [HERE / "kernels.cpp", HERE / "runtime.cpp"]
    sources += [CSRC / "cpu" / "isa.cpp", CSRC / "cpu" / "settings.cpp"]
    sources += [CSRC / "cpu" / f"isa_{isa}.cpp" for isa in ISA_FLAGS]

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        flags = [*FLAGS, *sanitize, *ISA_FLAGS.get(source.stem.removeprefix("isa_"), [])]
        built = run([*cxx, *flags, "-c", str(source), "-o", str(target)])
        assert built.returncode == 0, built.stdout
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(compile_one, sources)]
    program = str(tmp_path / "kernels")
    linked = run([*cxx, "-pthread", *sanitize, *objects, "-o", program])
    assert linked.returncode == 0, linked.stdout

    result = run([program, *cases], UBSAN_OPTIONS="print_stacktrace=1")
    # The last lines name the instruction set and the shape, then what was wrong with them.
    assert result.returncode == 0, "\n".join(result.stdout.splitlines()[-60:])
    assert result.stdout.endswith("passed\n")
