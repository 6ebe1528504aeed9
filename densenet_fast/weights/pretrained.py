"""torchvision's pretrained weights, through its own enums, torch.hub's download and its cache."""

from __future__ import annotations

import enum
import hashlib
import http.client
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from densenet_fast.weights.checkpoint_files import StateDict
from densenet_fast.weights.load import load_into

_ENUMS = {
    "densenet121": "DenseNet121_Weights",
    "densenet161": "DenseNet161_Weights",
    "densenet169": "DenseNet169_Weights",
    "densenet201": "DenseNet201_Weights",
}
_DEFAULTS = {
    "bn_size": 4,
    "compression": 0.5,
    "in_channels": 3,
    "small_inputs": False,
    "spatial_dims": 2,
}


class Pretrained:
    """The weights that `weights=` names. Nothing is downloaded before `load`.

    Raises:
        TypeError, ValueError: `weights` does not name weights of the network `network`.
        ImportError: torchvision is missing.
    """

    def __init__(self, network: str, weights: Any) -> None:
        if network not in _ENUMS:
            raise ValueError(
                f"{network} has no pretrained weights: weights must be None, got {weights!r}; "
                "densenet_fast.load_weights reads files"
            )
        if not isinstance(weights, (str, enum.Enum)):
            raise TypeError(
                f"weights must be a name as 'DEFAULT', one of torchvision's {_ENUMS[network]} or "
                f"None, got {weights!r} ({type(weights).__name__})"
            )
        self._network = network
        self._chosen: Any = _member(_ENUMS[network], weights)

    def arguments(self, shape: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """All of the network's; ValueError if a given one is another than the weights need."""
        needed = {**shape, **_DEFAULTS, "num_classes": len(self._chosen.meta["categories"])}
        for name, expected in needed.items():
            value = given.get(name, expected)
            if (tuple(value) if isinstance(value, list) else value) != expected:
                hint = "; for other classes, replace model.classifier afterwards"
                raise ValueError(
                    f"{name}={value!r} does not fit the weights {self._chosen!r} of "
                    f"{self._network}, which need {name}={expected!r}"
                    f"{hint if name == 'num_classes' else ''}"
                )
        return {**given, **needed}

    def load(self, model: nn.Module, progress: bool) -> None:
        """Load the weights from torch.hub's cache, where they are downloaded to if need be."""
        url = str(self._chosen.url)
        file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
        match = torch.hub.HASH_REGEX.search(file.name)
        expected = match[1] if match else ""
        try:
            # torch.hub compares hashes when it downloads, not when it finds a file in its cache.
            if expected and file.exists():
                found = hashlib.sha256(file.read_bytes()).hexdigest()[: len(expected)]
                if found != expected:
                    raise ValueError(f"its SHA-256 begins with {found}, expected {expected}")
            state = self._chosen.get_state_dict(
                progress=progress, check_hash=True, map_location="cpu", weights_only=True
            )
        except (OSError, http.client.HTTPException) as error:
            if file.exists():
                raise RuntimeError(f"the cached weights {file} cannot be read: {error}") from error
            wanted = f" (its SHA-256 begins with {expected})" if expected else ""
            raise RuntimeError(
                f"{self._chosen!r} could not be downloaded ({type(error).__name__}: {error}). "
                f"Without network, put the file from {url} to {file}{wanted}"
            ) from error
        except Exception as error:  # what torch.load raises on damaged files is of many types
            message = f"the download from {url} was damaged and has not been kept: {error}"
            if file.exists():
                message = (
                    f"the cached weights {file} are damaged: {error}. Delete the file; it is from "
                    f"{url}"
                )
            raise RuntimeError(message) from error
        load_into(model, StateDict(str(file), None, state))


def _member(enum_name: str, weights: Any) -> Any:
    """The member of torchvision's enum that `weights` is or names."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"weights={weights!r} needs torchvision: pip install 'densenet_fast[weights]'"
        ) from error
    known: Any = getattr(models, enum_name)
    if isinstance(weights, known):
        return weights
    if not isinstance(weights, str):
        raise TypeError(f"weights must be of torchvision's {enum_name}, got {weights!r}")
    name = weights.removeprefix(f"{enum_name}.")
    if name not in known.__members__:
        choices = ", ".join(map(repr, known.__members__))
        raise ValueError(f"there are no weights {weights!r} in {enum_name}, which has {choices}")
    return known[name]
