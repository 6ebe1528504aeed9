"""Files that are there entirely or as they were before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from densenet_fast.train.errors import UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside the old one, make it last, and put it in the old one's place.

    Raises:
        UsageError: the disk is full, or the folder cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _make_last(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(_why(path, len(content), error)) from error
        raise


def link_atomically(source: Path, path: Path) -> None:
    """`path` becomes what `source` is now, without a second copy where the file system can.

    Raises:
        UsageError: as for `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # some file systems have no links
        write_atomically(path, source.read_bytes())
        return
    os.replace(temporary, path)
    _make_last(path.parent)


def _make_last(folder: Path) -> None:
    """The folder's entries on the disk, not only the file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(path: Path, needed: int, error: OSError) -> str:
    kept = f"; {path.name} is whole, as it was before" if path.exists() else ""
    if error.errno in FULL:
        free = free_bytes(path.parent)
        return (
            f"the disk is full: {path} needs {mib(needed)}, {path.parent} has {mib(free)} free"
            f"{kept}; make room and go on with --resume"
        )
    return f"cannot write {path}: {error}{kept}"


def free_bytes(folder: Path) -> int:
    """What the file system of a folder has left for this user."""
    return shutil.disk_usage(folder).free


def mib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.1f} MiB"


def check_folder(folder: Path, needed: int) -> None:
    """Make an output folder, and see that `needed` bytes can be written there.

    Raises:
        UsageError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written")
    except OSError as error:
        raise UsageError(f"cannot write to --output-dir {str(folder)!r}: {error}") from error
    free = free_bytes(folder)
    if free < needed:
        raise UsageError(
            f"--output-dir {str(folder)!r}: the disk is full, the checkpoints need "
            f"{mib(needed)} and {mib(free)} are free"
        )
