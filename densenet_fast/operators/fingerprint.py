"""Fingerprints of the sources of `_C` and `_cuda`, baked into them and compared on loading.

setup.py runs this file by itself, before the package can be imported: standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

FOLDERS = ("csrc", "csrc/cpu")
CUDA_FOLDERS = ("csrc", "csrc/cuda")


def fingerprint(root: Path, folders: Sequence[str] = FOLDERS) -> str | None:
    """Digest of the files in `folders` under `root`; None without sources (installed package)."""
    if not (root / "csrc" / "ops.cpp").is_file():
        return None
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted((root / folder).iterdir()):
            if file.is_file() and not file.name.startswith("."):
                digest.update(file.relative_to(root).as_posix().encode() + b"\0")
                digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
