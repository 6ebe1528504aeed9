"""The dispatch of CUDA tensors, compiled for CPU tensors, in front of the emulated kernels.

In a process of its own: there it replaces the CPU kernels of the operators.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import host_build
from emulation import SOURCES
from torch.utils.cpp_extension import include_paths, library_paths

TESTS = host_build.HERE.parent
SETUP = """
import sys
sys.path[:0] = [{tests!r}, {emulator!r}, {repository!r}]
import torch
from torch import Tensor
from densenet_fast import operators
from densenet_fast.blocks import stem
from densenet_fast.operators import reference
from block_operator_cases import *
from ops_arguments import ARGUMENTS, arguments, definition, tensors, wide
torch.ops.load_library({library!r})
operators.select = lambda tensor: "cpu"  # whatever the type: the compiled operator
stem.in_place = lambda device, *, synchronised: False  # as on a GPU
kernel = torch.ops.densenet_fast
"""


def build_dispatch(**options: Any) -> Path:
    """The library to load into such a process; `options` are those of `host_build.build`."""
    return host_build.build(
        [*SOURCES[:-1], host_build.CSRC / "cuda" / "dispatch.cpp"],
        optimize="-O1",
        defines=["TORCH_TARGET_VERSION=0x020a000000000000", "DENSENET_FAST_CUDA_KEY=CPU"],
        include=[Path(p) for p in include_paths()],
        link=[*(f"-L{p}" for p in library_paths()), "-ltorch_cpu"],
        **options,
    )


def run(library: Path, code: str) -> str:
    """What `code` prints in such a process."""
    setup = SETUP.format(
        tests=str(TESTS),
        emulator=str(host_build.HERE),
        repository=str(TESTS.parent),
        library=str(library),
    )
    result = subprocess.run(
        [sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
