"""Runs the tests of the CUDA kernels under NVIDIA's compute-sanitizer, one tool after the other.

    python tests/cuda/compute_sanitizer.py                      # all four tools; an hour or more
    python tests/cuda/compute_sanitizer.py --tool racecheck -- -k "conv3x3 and float16"

What follows `--` goes to pytest, in place of the usual selection. The exit status is 0 only where
no tool and no test has found anything.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = "tests/cuda/test_cuda_kernels.py"
# Every kernel, type and layout. Graphs and counts of memory do not go with the settings below.
SELECTION = ("-k", "conv1x1 or conv3x3 or transition or products or weights")
FOUND = 86  # exit status of compute-sanitizer for what it finds, none of pytest's


def find_sanitizer() -> str:
    """The path of compute-sanitizer; an error that says where it comes from without it."""
    candidates = [shutil.which("compute-sanitizer")]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(shutil.which(str(Path(home) / "bin" / "compute-sanitizer")))
    for candidate in candidates:
        if candidate:
            return candidate
    raise SystemExit(
        "compute-sanitizer was found neither on PATH nor in CUDA_HOME, CUDA_PATH or "
        "/usr/local/cuda: it is part of the CUDA toolkit"
    )


def check_device() -> None:
    """An error that says why not, where the CUDA kernels cannot run."""
    sys.path.insert(0, str(REPOSITORY))
    from densenet_fast.operators import cuda_device

    obstacle = cuda_device.obstacle()
    if obstacle is not None:
        raise SystemExit(f"the CUDA kernels cannot run here: {obstacle}")


def command(sanitizer: str, tool: str, pytest_arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs the tests under one tool."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND)]
    if tool != "initcheck":  # which must see who wrote a value, PyTorch's kernels too
        options += ["--kernel-name", "kernel_substring=densenet_fast"]
    selection = list(pytest_arguments) or list(SELECTION)
    # Without the project's options for pytest, one of which is pytest-benchmark's.
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "cuda", "-q", TESTS]
    return [sanitizer, *options, *pytest, *selection]


def environment(tool: str) -> dict[str, str]:
    """Where allocations matter, each tensor gets its own, so that an overrun leaves it."""
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    return {**os.environ, **settings}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tools; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="may be repeated; all four by default"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, behind `--`")
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    check_device()
    failed = []
    for tool in options.tool or TOOLS:
        run = command(sanitizer, tool, options.pytest)
        print(f"==== {shlex.join(run)}", flush=True)
        status = subprocess.run(run, cwd=REPOSITORY, env=environment(tool), check=False).returncode
        if status != 0:
            failed.append(f"{tool} has findings" if status == FOUND else f"{tool}: exit {status}")
    print("\n".join(["==== compute-sanitizer", *(failed or ["no findings"])]))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
