"""The kernels of csrc/cuda, emulated, under AddressSanitizer and UndefinedBehaviorSanitizer.

Unlike the emulator's own access checks these see every access, also one that stays inside some
other buffer of the call, and undefined arithmetic: both shared memory and workspaces are blocks of
exactly the size that was asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys

import host_build
import pytest
from emulation import build_kernels
from host_build import Patch
from ops_arguments import ARGUMENTS, BLOCKS
from test_kernels_orders import STEPS

pytestmark = pytest.mark.slow

FAULTS = {
    "shared memory, one element too far": (
        Patch(
            "cuda/pointwise.cuh",
            "A* sums = reinterpret_cast<A*>(shared) + threadIdx.x;",
            "A* sums = reinterpret_cast<A*>(shared) + threadIdx.x + 1;",
        ),
        "heap-buffer-overflow",
    ),
    "an image, one row too many": (
        Patch("cuda/pooling.cu", "row < rows; ++row", "row <= rows; ++row"),
        "heap-buffer-overflow",
    ),
    "an overflow of int": (
        Patch(
            "cuda/pooling.cu",
            "if (y < 0 || y >= x.h) continue;",
            "if (y < 0 || y >= x.h || (x.h + 1) * (x.h + 0x7ffffffe) == 5) continue;",
        ),
        "signed integer overflow",
    ),
    "a misaligned access": (
        Patch(
            "cuda/pooling.cu",
            "gradient.data[pixel * gradient.pitch + c] = narrow<E>(d);",
            "*reinterpret_cast<E*>("
            "reinterpret_cast<char*>(gradient.data + pixel * gradient.pitch + c) - 1) = "
            "narrow<E>(d);",
        ),
        "misaligned address",
    ),
}


def run(*patches: Patch) -> subprocess.CompletedProcess[str]:
    """All operators on kernels with these faults, under both sanitizers."""
    for sanitizer in ("address", "undefined"):
        if not host_build.supports(sanitizer):
            pytest.skip(f"the compiler builds no programs with -fsanitize={sanitizer}")
    library = build_kernels(sanitize=("address", "undefined"), patches=patches)
    path = os.pathsep.join([str(host_build.HERE), str(host_build.HERE.parent), *sys.path])
    return subprocess.run(
        [sys.executable, str(host_build.HERE / "sanitized.py"), str(library)],
        env={**host_build.sanitized_environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_all_kernels() -> None:
    result = run()
    where = "\n".join([*result.stdout.splitlines()[-2:], result.stderr[-6000:]])
    assert result.returncode == 0, where
    count = len(ARGUMENTS) - len(BLOCKS) + len(STEPS)
    assert result.stdout.endswith(f"\n{count} operators passed\n"), where
    assert "runtime error" not in result.stderr
    assert "Sanitizer" not in result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(fault: str) -> None:
    patch, report = FAULTS[fault]
    result = run(patch)
    assert result.returncode != 0
    assert report in result.stderr, result.stdout[-200:] + result.stderr[-3000:]
