"""Pickles whose tensors are read and nothing else: a `pickle_module` for `torch.load`.

The names in a file are never looked up. What torch itself holds for harmless in a state dict is
made; everything else becomes an `Inert` object, which keeps what the file says of it. So no code of
a file runs, none of its classes is instantiated, and none needs to be installed. A list of classes
for `torch.serialization.safe_globals` would instantiate them, and would never be complete.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import IO, Any, ClassVar

from torch import Tensor

from densenet_fast.operators.torch_internals import IMPORT_MAPPING, NAME_MAPPING, allowed_globals

# In Python, as torch's own: what is built can be restricted, and an index in a damaged file takes
# no memory.
_Unpickler: Any = pickle._Unpickler
_EXTENSIONS = b"".join((pickle.EXT1, pickle.EXT2, pickle.EXT4))  # codes of the process's classes

# Functions, and classes in small letters, that pickles of plain data call. Any other call in small
# letters refuses the file: not for safety, as nothing is called, but because a file that asks for
# `eval` should be known for what it is.
_DATA = frozenset(
    f"{module}.{name}"
    for modules, names in (
        ("array", "_array_reconstructor array"),
        ("builtins", "frozenset range slice type"),
        ("collections", "defaultdict deque"),
        ("copyreg", "_reconstructor"),
        ("datetime", "date datetime time timedelta timezone"),
        ("functools", "partial"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray numpy._core.multiarray", "_reconstruct scalar"),
        ("numpy.core.numeric numpy._core.numeric", "_frombuffer"),
        ("numpy.random._pickle", "__bit_generator_ctor __generator_ctor __randomstate_ctor"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
        ("torch.nn.backends.thnn", "_get_thnn_function_backend"),  # modules of before torch 1.5
    )
    for module in modules.split()
    for name in names.split()
)


class Inert:
    """An object of a class that is not looked up: its items and its state."""

    called = ""  # the full name in the file
    entries: dict[Any, Any]
    state: Any

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Whatever the arguments, which are not kept."""
        inert = super().__new__(cls)
        inert.entries, inert.state = {}, None
        return inert

    def __init__(self, *_: Any, **__: Any) -> None:
        """Only where a pickle calls: it makes the objects of most classes without."""
        name = self.called.rpartition(".")[2]
        if self.called not in _DATA and not name.lstrip("_")[:1].isupper():
            raise pickle.UnpicklingError(f"the file calls GLOBAL {self.called}")

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, _: Any) -> None:
        """Items without names are not kept."""

    extend = add = append


class Unpickler(_Unpickler):
    """Makes tensors, plain data and `Inert` objects."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in _Unpickler.dispatch.items() if code not in _EXTENSIONS
    }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the file."""
        # torch writes the names of Python 2.
        renamed = IMPORT_MAPPING.get(module, module), name
        called = ".".join(NAME_MAPPING.get((module, name), renamed))
        harmless = allowed_globals()
        return harmless[called] if called in harmless else type(name, (Inert,), {"called": called})

    def load_build(self) -> None:
        """Give an object its state; not a class or function, which the process may share."""
        if not isinstance(self.stack[-2], (Inert, Tensor, OrderedDict)):
            kind = type(self.stack[-2]).__name__
            raise pickle.UnpicklingError(f"the file gives a state to a {kind}")
        super().load_build()

    def load_binpersid(self) -> None:
        """Leave out the source that files of before torch 1.6 have of a network's classes."""
        reference = self.stack[-1]
        if isinstance(reference, tuple) and len(reference) > 1 and reference[0] == "module":
            self.stack[-1] = reference[1]
        else:
            super().load_binpersid()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BINPERSID[0]] = load_binpersid


def load(file: IO[bytes], **options: Any) -> Any:
    """`pickle.load`, of which torch reads the parts of files of before torch 1.6."""
    return Unpickler(file, **options).load()


def plain(content: Any) -> Any:
    """What was read, with state dicts for networks and dicts for other mappings, one level down."""
    content = _plain(content)
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    return content


def _plain(value: Any) -> Any:
    if not isinstance(value, Inert):
        return value
    if isinstance(value.state, Mapping) and "_modules" in value.state:
        return dict(_tensors(value, ""))
    return value.entries or value


def _tensors(network: Inert, prefix: str) -> Iterator[tuple[str, Any]]:
    """As `nn.Module.state_dict`, from the `__dict__` that a module is pickled as."""
    state = network.state
    temporary = state.get("_non_persistent_buffers_set", ())
    for kind, left_out in (("_parameters", ()), ("_buffers", temporary)):
        for name, tensor in state[kind].items():
            if tensor is not None and name not in left_out:
                yield prefix + name, tensor
    for name, module in state["_modules"].items():
        if module is not None:
            yield from _tensors(module, f"{prefix}{name}.")
