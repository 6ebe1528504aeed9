"""The dispatch of CUDA tensors, compiled for CPU tensors, in front of the emulated kernels.

In a process of its own: there it replaces the CPU kernels of the operators.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import host_build
from emulation import SOURCES
from torch.utils.cpp_extension import include_paths, library_paths

TESTS = host_build.HERE.parent
Run = Callable[[str], str]
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
# Importing PyTorch takes longer than most tests: one process does it, and its forks run the code.
SERVE = """
import json, os, signal, tempfile, traceback
for line in sys.stdin:
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        signal.alarm(600)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        status = 1
        try:
            exec(json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    texts = [file.seek(0) or file.read() for file in files]
    print(json.dumps([status, *texts]), flush=True)
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
    setup = SETUP.format(
        tests=str(TESTS),
        emulator=str(host_build.HERE),
        repository=str(TESTS.parent),
        library=str(library),
    )
    command = [sys.executable, "-c", setup + SERVE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        into, out = server.stdin, server.stdout

        def run(code: str) -> str:
            print(json.dumps(code), file=into, flush=True)
            status, printed, errors = json.loads(out.readline())
            assert status == 0, errors[-3000:]
            return str(printed)

        yield run
