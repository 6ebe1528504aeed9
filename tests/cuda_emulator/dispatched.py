"""The dispatch of CUDA tensors, compiled for CPU tensors, in front of the emulated kernels.

In a process of its own: there it replaces the CPU kernels of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import host_build
from emulation import SOURCES
from forks import forking
from torch.utils.cpp_extension import include_paths, library_paths

Run = Callable[[str], str]
SETUP = """
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
        [*SOURCES[:-1], host_build.HERE / "dispatch_on_cpu.cpp"],
        optimize="-O1",
        include=[Path(p) for p in include_paths()],
        link=[*(f"-L{p}" for p in library_paths()), "-ltorch_cpu"],
        **options,
    )


@contextmanager
def serving(library: Path) -> Iterator[Run]:
    """A function that runs code in a new process with the library, and returns what it prints."""
    with forking(SETUP.format(library=str(library))) as fork:

        def run(code: str) -> str:
            done = fork(code)
            assert done.status == 0, done.errors[-3000:]
            return done.printed

        yield run
