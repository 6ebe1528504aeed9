"""Loads the compiled module `densenet_fast._C`, which registers the operators and CPU kernels.

The module is looked for beside this file (installed package, development build) and then in the
other `densenet_fast` folders of sys.path: in the repository's root the source folder comes before
the installed package, has no compiled module of its own, and borrows the installed one.

LOADED says whether that worked, LOAD_ERROR why not. Without it the reference twins do the work.
CURRENT is False, after a warning, where the C++ sources beside this package are not those the
module was compiled from; None where there are none.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  its libraries must be loaded before the module that links to them

from densenet_fast._fingerprint import fingerprint

_NAME = "densenet_fast._C"
_PACKAGE = Path(__file__).resolve().parent

REINSTALL = "run `pip install .` in the repository's root"


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why there is none."""
    # An empty entry of sys.path is the current directory.
    folders = [_PACKAGE, *(Path(entry or ".") / "densenet_fast" for entry in sys.path)]
    spec = PathFinder.find_spec(_NAME, [str(folder) for folder in folders])
    if spec is None or spec.loader is None:
        return None, (
            "the compiled module densenet_fast._C was found neither in "
            f"{_PACKAGE} nor in an installed densenet_fast for this Python: {REINSTALL}"
        )
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the compiled module {spec.origin} does not load ({error}): {REINSTALL}"
    sys.modules[_NAME] = module
    return module, None


def _current(module: ModuleType) -> bool | None:
    """Whether the module was compiled from the sources beside this package; None without any."""
    here = fingerprint(_PACKAGE.parent)
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


C, LOAD_ERROR = _load()
LOADED = C is not None
CURRENT: bool | None = None

if C is not None:
    C.isa_in_use()  # raises for an unknown or unsupported DENSENET_FAST_ISA: now, not in a step
    CURRENT = _current(C)
