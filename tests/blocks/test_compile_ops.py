"""The fused nodes as PyTorch's dispatcher knows them: schema, fake tensors, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast import DenseBlock, EfficientDenseNet
from densenet_fast.blocks import nodes, stem_convolution
from densenet_fast.blocks.dense_block import dense_block
from densenet_fast.blocks.max_transition import max_transition
from densenet_fast.blocks.specs import (
    CHECKPOINT_MODES,
    AvgPoolTail,
    Checkpoint,
    ConvGeometry,
    LayerSpec,
    MaxTransition,
    Tail,
    TransitionTail,
)
from densenet_fast.blocks.stem import conv_stem, stem_norm_relu_maxpool
from densenet_fast.modules.steps import norm_spec

KINDS = ("block", "stem_convolution", "stem", "max_transition")
OPERATORS = {f"{kind}_{way}" for kind in KINDS for way in ("forward", "backward")} | {"count_step"}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


class Recorder(TorchDispatchMode):
    """The arguments of every fused node that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "densenet_fast_nodes":
            name = func._schema.name.split("::")[1]
            self.calls[name] = (func, *torch.utils._pytree.tree_map(_detached, args))
        return func(*args, **(kwargs or {}))


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def block_call(checkpoint: Checkpoint, tail: str, frozen: bool = False) -> Tensor:
    torch.manual_seed(0)
    counted: list[Tensor] = []
    block = DenseBlock(2, 6, 2, 4, 0.2)
    if frozen:
        block.eval()
    layers = [
        LayerSpec(
            norm_spec(layer.norm1, counted),
            layer.conv1.weight,
            norm_spec(layer.norm2, counted),
            layer.conv2.weight,
            0.2,
        )
        for layer in block.values()
    ]
    behind: Tail | None = None
    if tail in ("transition", "linear"):
        weight = nn.Parameter(torch.randn(5, 14, 1, 1))
        norm = norm_spec(nn.BatchNorm2d(14), counted)
        behind = TransitionTail(norm, weight, tail == "linear")
    elif tail == "average":
        behind = AvgPoolTail(norm_spec(nn.BatchNorm2d(14), counted))
    input = torch.randn(2, 6, 5, 4, requires_grad=True)
    return dense_block(input, layers, tail=behind, checkpoint=checkpoint, hold=1)


def stem_call(convolution: bool) -> Tensor:
    torch.manual_seed(0)
    counted: list[Tensor] = []
    norm = norm_spec(nn.BatchNorm2d(6), counted)
    if not convolution:
        input = torch.randn(2, 6, 9, 7, requires_grad=True)
        return stem_norm_relu_maxpool(input, norm)
    weight, bias = nn.Parameter(torch.randn(6, 3, 7, 7)), nn.Parameter(torch.randn(6))
    geometry = ConvGeometry((2, 2), (3, 3), (1, 1), 1)
    input = torch.randn(2, 3, 19, 16, requires_grad=True)
    return conv_stem(input, weight, bias, geometry, norm)


def stem_convolution_call() -> Tensor:
    torch.manual_seed(0)
    conv = nn.Conv3d(1, 6, 7, 2, 3, bias=False)
    input = torch.randn(2, 1, 17, 12, 16, requires_grad=True)
    return stem_convolution.module_forward(conv, input, conv.weight, None)


def max_transition_call() -> Tensor:
    torch.manual_seed(0)
    norm = norm_spec(nn.BatchNorm2d(6), [])
    weight, bias = nn.Parameter(torch.randn(4, 6, 1, 1)), nn.Parameter(torch.randn(4))
    input = torch.randn(2, 6, 5, 4, requires_grad=True)
    return max_transition(input, MaxTransition(norm, weight, bias, 0.2))


CASES = {
    **{
        f"{checkpoint}-{tail}": lambda c=checkpoint, t=tail: block_call(c, t)
        for checkpoint in CHECKPOINT_MODES
        for tail in ("none", "transition", "linear", "average")
    },
    "frozen": lambda: block_call("bottleneck", "transition", frozen=True),
    "stem": lambda: stem_call(False),
    "conv-stem": lambda: stem_call(True),
    "stem_convolution": stem_convolution_call,
    "max_transition": max_transition_call,
}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node is an operator, as in a graph."""
    monkeypatch.setattr(nodes, "recorded", lambda _: True)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    with Recorder() as recorder:
        CASES[case]().sum().backward()
    kind = next((kind for kind in KINDS[1:] if kind in case), "block")
    assert set(recorder.calls) - {"count_step"} == {f"{kind}_forward", f"{kind}_backward"}
    for operator, *arguments in recorder.calls.values():
        torch.library.opcheck(operator, tuple(arguments), test_utils=CHECKS)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    "case", ["bottleneck-transition", "conv-stem", "stem_convolution", "max_transition"]
)
def test_opcheck_of_graphs_for_any_size(case: str) -> None:
    with Recorder() as recorder:
        CASES[case]().sum()
    for operator, *arguments in recorder.calls.values():
        torch.library.opcheck(operator, tuple(arguments), test_utils=("test_aot_dispatch_dynamic",))


def test_every_operator_is_covered() -> None:
    defined = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("densenet_fast_nodes::")
    }
    assert defined == OPERATORS


def test_eager_mode_does_not_use_them() -> None:
    network = EfficientDenseNet(4, (2, 2), 8, num_classes=3)
    with Recorder() as recorder:
        network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not recorder.calls


@pytest.mark.parametrize(
    "case", ["bottleneck-transition", "conv-stem", "stem_convolution", "max_transition"]
)
def test_second_derivatives_are_refused(case: str) -> None:
    output = CASES[case]()
    wanted = [tensor for tensor in _leaves(output.grad_fn) if tensor.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradients[0].sum().backward()


def _leaves(node: Any) -> list[Tensor]:
    """The tensors that a graph of autograd begins with."""
    if hasattr(node, "variable"):
        return [node.variable]
    behind = [following for following, _ in node.next_functions if following is not None]
    return [leaf for following in behind for leaf in _leaves(following)]
