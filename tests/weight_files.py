"""Checkpoint files of small DenseNets of every library, and models that they do not change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import shake
from library_networks import monai_network, timm_network, torchvision_network, xrv_network
from torch import Tensor, nn

from densenet_fast import load_weights
from densenet_fast.modules.densenet import EfficientDenseNet

State = dict[str, Any]


def ours(**kwargs: Any) -> EfficientDenseNet:
    return EfficientDenseNet(8, (2, 3), 16, **{"num_classes": 5, **kwargs})


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "densenet_fast": ours,
    "torchvision": torchvision_network,
    "timm": timm_network,
    "MONAI": monai_network,
    "torchxrayvision": xrv_network,
}


def trained(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 whose norms and counters are not those of a fresh one."""
    torch.manual_seed(seed)
    network = make().double().eval()
    shake(network, seed)
    for at, (name, buffer) in enumerate(network.named_buffers()):
        if name.endswith("num_batches_tracked"):
            buffer.fill_(100 * seed + at)
    return network


def saved(path: Path, state: Any, **kwargs: Any) -> Path:
    torch.save(state, path, **kwargs)
    return path


def first_files(state: State) -> State:
    """As torchvision's first files: norm.1 for norm1, and no counters."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }


def efficient_files(state: State) -> State:
    """As efficient_densenet_pytorch: norm_final for norm5."""
    return {key.replace("features.norm5.", "features.norm_final."): v for key, v in state.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def snapshot(model: nn.Module) -> tuple[list[Tensor], State]:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[list[Tensor], State]) -> None:
    """The same tensors with the same values, and parameters that still are some."""
    tensors, state = before
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(parameter.requires_grad for parameter in model.parameters())


def refused(path: Any, error: type[Exception], match: str, **kwargs: Any) -> Exception:
    """The error of loading into a small network, which stays as it was."""
    model = trained(ours)
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_weights(model, path, **kwargs)
    assert_unchanged(model, before)
    return caught.value
