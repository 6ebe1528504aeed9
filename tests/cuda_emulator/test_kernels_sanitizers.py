"""The kernels of csrc/cuda, emulated, under AddressSanitizer and UndefinedBehaviorSanitizer.

Unlike the emulator's own access checks these see every access, also one that stays inside some
other buffer of the call, and undefined arithmetic: both shared memory and workspaces are blocks of
exactly the size that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import host_build
import pytest
from emulation import build_kernels
from forks import Done, Forks, forking
from host_build import Patch
from ops_arguments import ARGUMENTS, BLOCKS
from test_kernels_orders import STEPS

pytestmark = pytest.mark.slow

FAULTS = {
    "shared memory, one element too far": (
        Patch(
            "cuda/pooling.cu",
            "sum_of_runs(sum, shared)",
            "sum_of_runs(sum, shared + sizeof(A))",
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


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Runs code behind the imports of `sanitized`, in processes with the sanitizers' runtime."""
    for sanitizer in ("address", "undefined"):
        if not host_build.supports(sanitizer):
            pytest.skip(f"the compiler builds no programs with -fsanitize={sanitizer}")
    with forking("import sanitized", host_build.sanitized_environment()) as function:
        yield function


def run(forks: Forks, *patches: Patch) -> Done:
    """All operators on kernels with these faults, under both sanitizers."""
    # The compiler takes most of the time, less than for -O1.
    library = build_kernels(sanitize=("address", "undefined"), patches=patches, optimize="-Og")
    return forks(f"sanitized.main({str(library)!r})")


def test_all_kernels(forks: Forks) -> None:
    result = run(forks)
    where = "\n".join([*result.printed.splitlines()[-2:], result.errors[-6000:]])
    assert result.status == 0, where
    count = len(ARGUMENTS) - len(BLOCKS) + len(STEPS)
    assert result.printed.endswith(f"\n{count} operators passed\n"), where
    assert "runtime error" not in result.errors
    assert "Sanitizer" not in result.errors


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(forks: Forks, fault: str) -> None:
    patch, report = FAULTS[fault]
    result = run(forks, patch)
    assert result.status != 0
    assert report in result.errors, result.printed[-200:] + result.errors[-3000:]
