"""A forward that fails midway: a fused node's norms have all counted the step, or none has."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from comparison import tiny
from devices import CPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast import EfficientDenseNet
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.modules import steps

IMAGES = (2, 3, 32, 32)


class FailingAt(TorchDispatchMode):
    """Raises an error in place of one of the operators that run.

    None of them replaces an old value by a new one: plain PyTorch copies those into `kept`, which
    allocates nothing and runs without Python's interpreter between.
    """

    def __init__(self, at: int, error: type[BaseException], kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.left = at
        self.error = error
        self.kept = {tensor.data_ptr() for tensor in kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or args[0].data_ptr() not in self.kept:
            if self.left == 0:
                raise self.error("at an operator")
            self.left -= 1
        return func(*args, **(kwargs or {}))


def nodes(network: EfficientDenseNet) -> list[list[nn.BatchNorm2d]]:
    """The norms of each fused node."""
    features = network.features
    parts = (
        ["norm0"],
        ["denseblock1", "transition1"],
        ["denseblock2", "norm5"],
    )
    return [
        [
            norm
            for name in names
            for norm in features.get_submodule(name).modules()
            if isinstance(norm, nn.BatchNorm2d)
        ]
        for names in parts
    ]


def counted(network: EfficientDenseNet, before: EfficientDenseNet) -> list[set[bool]]:
    """For each node whether its norms' buffers have changed: one answer, or two."""
    return [
        {
            not torch.equal(new, old)
            for norm, earlier in zip(*pair, strict=True)
            for new, old in zip(norm.buffers(), earlier.buffers(), strict=True)
        }
        for pair in zip(nodes(network), nodes(before), strict=True)
    ]


@pytest.mark.parametrize(
    "backend", [pytest.param("reference", marks=pytest.mark.slow), CPU], indirect=True
)
@pytest.mark.parametrize(
    ("checkpoint", "error"),
    list(zip(CHECKPOINT_MODES, (RuntimeError, MemoryError, KeyboardInterrupt), strict=True)),
)
def test_norms_of_a_node_count_together(
    backend: str,
    checkpoint: Checkpoint,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused: list[int] = []
    run = steps.fused
    monkeypatch.setattr(steps, "fused", lambda *a, **k: fused.append(1) or run(*a, **k))
    start = tiny(checkpoint=checkpoint)
    images = torch.randn(IMAGES)
    seen: list[list[set[bool]]] = []
    for at in range(1000):
        network = copy.deepcopy(start)
        try:
            with FailingAt(at, error, network.buffers()):
                network(images)
        except error:
            seen.append(counted(network, start))
        else:
            break
    # Fused nodes have failed at many places; compiled, all layers of a block are one of them.
    assert sum(fused) > (100 if backend == "reference" else 60)
    for answers in seen:
        assert all(len(changed) == 1 for changed in answers), answers
        done = [changed == {True} for changed in answers]
        assert done == sorted(done, reverse=True)  # in order, as one module after another
    assert [{True}] * 3 == counted(network, start)
    assert [{False}] * 3 in seen
    assert [{True}, {True}, {False}] in seen


def test_a_norm_that_was_called_alone_before_a_fused_step_has_its_backward() -> None:
    network, reference = tiny().double(), tiny().double()
    images = torch.randn(IMAGES, dtype=torch.float64)
    for model in (network, reference):
        stem = model.features
        first = stem.norm0(stem.conv0(images))
        if model is network:
            model(images)  # moves norm0's running statistics once more
        first.square().sum().backward()
    gradients = [model.features.conv0.weight.grad for model in (network, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_a_norm_that_is_used_twice_counts_twice() -> None:
    network, reference = tiny().double(), tiny().double()
    for model in (network, reference):
        block = model.features.denseblock1
        block.denselayer2.norm2 = block.denselayer1.norm2
        block.denselayer1.norm2.momentum = None  # an average over all steps
    reference.features.denseblock1.denselayer1.relu1.register_forward_hook(lambda *_: None)
    reference.features.denseblock1.denselayer2.relu1.register_forward_hook(lambda *_: None)
    images = torch.randn(IMAGES, dtype=torch.float64)
    for model in (network, reference):
        model(images)
    norm = network.features.denseblock1.denselayer1.norm2
    assert norm.num_batches_tracked == 2
    for one, other in zip(network.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
