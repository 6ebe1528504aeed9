"""Loads the compiled modules: `_C`, operators and CPU kernels, and `_cuda`, CUDA kernels.

A module is looked for in this package (installed package, development build) and then in the
other `densenet_fast` folders of sys.path: in the repository's root the source folder comes before
the installed package, has no compiled module of its own, and borrows the installed one.

LOADED says whether that worked, LOAD_ERROR why not. Without it the reference twins do the work.
CURRENT is False, after a warning, where the C++ sources beside this package are not those the
module was compiled from; None where there are none. CUDA is `_cuda` or None, CUDA_ERROR why.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

from densenet_fast.operators.fingerprint import CUDA_FOLDERS, FOLDERS, fingerprint

_PACKAGE = Path(__file__).resolve().parents[1]

REINSTALL = "run `pip install .` in the repository's root"
GET_CUDA = (
    "run `DENSENET_FAST_CUDA=1 pip install .` in the repository's root, with a CUDA toolkit "
    "installed and a torch that has CUDA"
)


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """A compiled module, or the reason why there is none."""
    # An empty entry of sys.path is the current directory.
    folders = [_PACKAGE, *(Path(entry or ".") / "densenet_fast" for entry in sys.path)]
    name = f"densenet_fast.{name}"
    spec = PathFinder.find_spec(name, [str(folder) for folder in folders])
    if spec is None or spec.loader is None:
        return None, (
            f"the compiled module {name} was found neither in "
            f"{_PACKAGE} nor in an installed densenet_fast for this Python: {REINSTALL}"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the compiled module {spec.origin} does not load ({error}): {REINSTALL}"
    sys.modules[name] = module
    return module, None


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    """`_cuda`, or the reason why there is none and how to get it."""
    if C is None:
        return None, LOAD_ERROR
    if torch.version.cuda is None:
        return None, f"this torch, {torch.__version__}, is built without CUDA"
    module, reason = _load("_cuda")
    missing: str = C.cuda_missing()
    if module is None and missing:
        reason = f"the CUDA kernels were not built: {missing}; {GET_CUDA}"
    return module, reason


def _current(module: ModuleType, folders: Sequence[str] = FOLDERS) -> bool | None:
    """Whether the module was compiled from the sources beside this package; None without any."""
    here = fingerprint(_PACKAGE.parent, folders)
    if here is None:
        return None
    if here != module.fingerprint():
        warnings.warn(
            f"{module.__file__} was compiled from other sources than {_PACKAGE.parent / 'csrc'}: "
            f"{REINSTALL} (or `python setup.py build_ext --inplace`) to run what you see",
            RuntimeWarning,
            stacklevel=2,
        )
    return here == module.fingerprint()


C, LOAD_ERROR = _load("_C")
LOADED = C is not None
CURRENT: bool | None = None

if C is not None:
    C.isa_in_use()  # raises for an unknown or unsupported DENSENET_FAST_ISA: now, not in a step
    CURRENT = _current(C)

CUDA, CUDA_ERROR = _load_cuda()
if CUDA is not None:
    _current(CUDA, CUDA_FOLDERS)
