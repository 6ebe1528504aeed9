"""Small DenseNets of every library with the same shape, and their checkpoint files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import shake
from torch import Tensor, nn

from densenet_fast import load_weights
from densenet_fast.modules.densenet import EfficientDenseNet

GROWTH, BLOCKS, INITIAL, CLASSES = 4, (2, 3), 8, 5
State = dict[str, Any]


def ours(**kwargs: Any) -> EfficientDenseNet:
    shape = {"bn_size": 4, "num_classes": CLASSES, **kwargs}
    return EfficientDenseNet(GROWTH, BLOCKS, INITIAL, **shape)


def torchvisions() -> nn.Module:
    models = pytest.importorskip("torchvision.models.densenet")
    return models.DenseNet(GROWTH, BLOCKS, INITIAL, num_classes=CLASSES)


def timms(**kwargs: Any) -> nn.Module:
    models = pytest.importorskip("timm.models.densenet")
    return models.DenseNet(GROWTH, BLOCKS, **{"num_classes": CLASSES, **kwargs})


def monais() -> nn.Module:
    models = pytest.importorskip("monai.networks.nets")
    return models.DenseNet(2, 3, CLASSES, INITIAL, GROWTH, BLOCKS)


def torchxrayvisions(**kwargs: Any) -> nn.Module:
    models = pytest.importorskip("torchxrayvision.models")
    shape = {"num_classes": CLASSES, "in_channels": 3, **kwargs}
    return models.DenseNet(GROWTH, BLOCKS, INITIAL, **shape)


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "densenet_fast": ours,
    "torchvision": torchvisions,
    "timm": timms,
    "MONAI": monais,
    "torchxrayvision": torchxrayvisions,
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


def images(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def snapshot(model: nn.Module) -> tuple[list[Tensor], State]:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors, {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[list[Tensor], State]) -> None:
    """The same tensors with the same values."""
    tensors, state = before
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def refused(path: Any, error: type[Exception], match: str, **kwargs: Any) -> Exception:
    """The error of loading into a small network, which stays as it was."""
    model = trained(ours)
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_weights(model, path, **kwargs)
    assert_unchanged(model, before)
    return caught.value
