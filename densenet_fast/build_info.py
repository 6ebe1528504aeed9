"""What is installed and what runs: the first thing to look at, and to put into a bug report."""

from __future__ import annotations

import platform
from typing import Any

import torch

from densenet_fast._version import __version__
from densenet_fast.operators import cuda_device, extension


class BuildInfo(dict[str, Any]):
    """A dictionary that prints as a small table."""

    def __str__(self) -> str:
        width = max(map(len, self)) + 2
        return "\n".join(f"{key + ':':<{width}}{_text(value)}" for key, value in self.items())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (", ".join(value) or "-") if isinstance(value, list) else str(value)


def build_info() -> BuildInfo:
    """Versions, compiler, instruction sets and backends of this installation.

    A dictionary whose `str` is readable:

    - ``version``, ``python``, ``torch``: what runs
    - ``extension``: path of the compiled module, None if there is none
    - ``extension_error``: why there is none, None if there is one
    - ``extension_is_current``: False if the module was compiled from other C++ sources than those
      beside this package; None without sources (installed package) or without a module
    - ``built_with_torch``, ``compiler``: what the module was built with
    - ``cpu_isa_compiled``, ``cpu_isa_usable``, ``cpu_isa``: instruction sets compiled in, best
      first, those that this processor has, and the one in use (choose with the environment
      variable DENSENET_FAST_ISA)
    - ``cpu_threads``: threads of the CPU kernels, which follow `torch.set_num_threads`
    - ``cuda``: whether there are CUDA kernels that can run on the current GPU; ``cuda_reason``: why
      not, and how to get them
    - ``cuda_extension``, ``cuda_architectures``, ``cuda_architectures_reason``, ``cuda_nvcc``: path
      of their module, compute capabilities compiled in, why these, and the compiler; empty if there
      is none
    """
    module, cuda = extension.C, extension.CUDA
    obstacle = cuda_device.obstacle()
    return BuildInfo(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        extension=module.__file__ if module else None,
        extension_error=extension.LOAD_ERROR,
        extension_is_current=extension.CURRENT,
        built_with_torch=module.built_with_torch() if module else None,
        compiler=module.compiler() if module else None,
        cpu_isa_compiled=module.isa_compiled() if module else [],
        cpu_isa_usable=module.isa_usable() if module else [],
        cpu_isa=module.isa_in_use() if module else None,
        cpu_threads=torch.get_num_threads(),
        cuda=obstacle is None,
        cuda_reason=obstacle,
        cuda_extension=cuda.__file__ if cuda else None,
        cuda_architectures=cuda_device.architectures(),
        cuda_architectures_reason=cuda.architectures_reason() if cuda else None,
        cuda_nvcc=cuda.nvcc() if cuda else None,
    )
