"""Reads the tensors of a checkpoint file, without running code that the file may hold."""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densenet_fast.weights import inert_pickle

_ZIP = b"PK\x03\x04"
_SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class StateDict:
    """Tensors by name. `entry` is where in the file they were, None if they are all of it."""

    path: str
    entry: str | None
    values: Mapping[str, Any]


def read(path: str | os.PathLike[str], entry: str | None = None) -> StateDict:
    """The state dict in a file of `torch.save` or of safetensors, on the CPU.

    Args:
        path: the file.
        entry: the name of the state dict in a file that holds several. Without it, the only one
            is taken.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ImportError: the file is one of safetensors, which is not installed.
        ValueError: the file is no checkpoint, is damaged, holds Python objects whose loading
            would run code, has no such entry, no tensors, or several entries to choose from.
    """
    file = _existing(path)
    with file.open("rb") as stream:
        head, size = stream.read(9), os.fstat(stream.fileno()).st_size
    length = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and 2 <= length <= size - 8:  # the length of a JSON header, and that
        content: Any = _read_safetensors(file)
    elif file.suffix == _SAFETENSORS:
        raise ValueError(f"{file} is called {_SAFETENSORS}, but its content is not of that format")
    else:
        content = _read_torch(file, zipped=head.startswith(_ZIP))
    return _chosen(str(file), content, entry)


def _existing(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path must be a path of a file, got {path!r} ({type(path).__name__})")
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory, expected a checkpoint file")
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file} (looked for in {Path.cwd()})")
    return file


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {file} needs safetensors: pip install 'densenet_fast[weights]'"
        ) from error
    try:
        tensors: dict[str, Tensor] = load_file(file, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no file of safetensors: {error}") from error
    return tensors


def _read_torch(file: Path, zipped: bool) -> Any:
    try:
        return _unpickled(str(file), mmap=zipped and mappable(file))
    except Exception as error:  # KeyError, EOFError, RuntimeError, ...: whatever it meets first
        refused = isinstance(error, pickle.UnpicklingError)
        needed = re.search(r"GLOBAL (\S+)", str(error)) if refused else None
        first = str(error).split(". ")[0].partition("\n")[0]
        kind = type(error).__name__
        what = "" if refused else f" ({kind}: {first})" if first else f" ({kind})"
        message = f"{file} is not a checkpoint of torch.save, or damaged{what}"
        if needed is not None:
            message = (
                f"{file} holds Python objects ({needed[1]}) beside tensors; loading them would run "
                "code from the file. If you trust it, load it once with torch.load(path, "
                "weights_only=False) where their classes are installed, and save the state_dict()"
            )
        elif "TorchScript" in str(error) and not refused:
            message = (
                f"{file} is a TorchScript archive: load it with torch.jit.load and save its "
                "state_dict()"
            )
        raise ValueError(message) from error


def mappable(file: Path) -> bool:
    """Whether the tensors stand in the file as they are; torch itself looks at nothing of this.

    Raises:
        BadZipFile: a part of the file is not what was written.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        # After torch.serialization.set_crc32_options(False), torch writes 0 for all of them.
        if any(part.CRC for part in parts) and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return all(part.compress_type == zipfile.ZIP_STORED for part in parts)


def _unpickled(file: str, mmap: bool) -> Any:
    """The content; where torch refuses it, its tensors with nothing made of what is beside them."""
    load = functools.partial(torch.load, file, map_location="cpu", mmap=mmap)
    try:
        return load(weights_only=True)
    except pickle.UnpicklingError as refusal:
        try:
            # Here the pickle module is the restriction.
            return inert_pickle.plain(load(pickle_module=inert_pickle, weights_only=False))
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise refusal from error


def _chosen(path: str, content: Any, entry: str | None) -> StateDict:
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected a state dict or a dict with one in it")
    if entry is not None:
        if entry not in content:
            raise ValueError(f"{path} has no entry {entry!r}; it has {_listed(content)}")
        if not _is_state_dict(content[entry]):
            kind = _described(content[entry])
            raise ValueError(f"{path}: the entry {entry!r} is {kind}, expected a state dict")
        return StateDict(path, entry, content[entry])
    found = [key for key, value in content.items() if _is_state_dict(value)]
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several state dicts: entry= must be one of {', '.join(map(repr, found))}"
        )
    if found:
        return StateDict(path, str(found[0]), content[found[0]])
    if _is_state_dict(content):
        return StateDict(path, None, content)
    raise ValueError(f"{path} holds no state dict; it has {_listed(content)}")


def _is_state_dict(value: Any) -> bool:
    """A mapping from names to tensors, of which one at least is no scalar and no vector.

    Counters and flags may be beside them; statistics of a training run alone do not count.
    """
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(part, Tensor) and part.dim() > 1 for part in value.values())
    )


def _listed(content: Mapping[Any, Any]) -> str:
    entries = [f"{key!r} ({_described(value)})" for key, value in content.items()]
    return ", ".join(entries) or "no entries"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, Mapping) and not value:
        return "an empty dict"
    return f"a {type(value).__name__}"
