"""torch.compile: one graph without breaks, with the outputs, gradients and states of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import tiny as network
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.utils import parametrizations

from densenet_fast import DenseBlock, DenseLayer, EfficientDenseNet, Transition
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.operators.backends import Setting, use_backend

pytestmark = pytest.mark.usefixtures("fresh_compiler")
pytest.importorskip("torch", minversion="2.14")  # older compilers are not promised anything


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


class Graphs:
    """The aot_eager backend, which remembers what it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return aot_eager(graph, inputs)

    def nodes(self) -> list[str]:
        """The fused nodes in the only graph there is."""
        assert len(self.graphs) == 1
        graphs = [m for m in self.graphs[0].modules() if isinstance(m, torch.fx.GraphModule)]
        called = [str(node.target).split(".") for graph in graphs for node in graph.graph.nodes]
        found = [name[1] for name in called if name[0] == "densenet_fast_nodes"]
        return [name for name in found if name.endswith("_forward")]


def run(call: Callable[[Tensor], Tensor], input: Tensor, amp: bool = False) -> Tensor:
    torch.manual_seed(2)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = call(input)
    if output.requires_grad:
        output.float().square().sum().backward()
    return output.detach()


def assert_equal(
    module: nn.Module,
    input: Tensor,
    *,
    amp: bool = False,
    steps: int = 2,
    backend: Any = None,
    rtol: float = 0.0,
) -> list[str]:
    """Steps compiled and in eager mode give the same, bit by bit if `rtol` is 0.

    Returns the fused nodes of the graph, with `backend` left alone.
    """
    eager = copy.deepcopy(module)
    graphs = Graphs()
    compiled = torch.compile(module, backend=backend or graphs, fullgraph=True)
    for _ in range(steps):
        given = [input.detach().clone().requires_grad_(input.requires_grad) for _ in range(2)]
        actual, wanted = run(compiled, given[0], amp), run(eager, given[1], amp)
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol)
        if input.requires_grad:
            torch.testing.assert_close(given[0].grad, given[1].grad, rtol=rtol, atol=rtol)
    same_parameters_and_buffers(module, eager, rtol)
    return [] if backend else graphs.nodes()


def same_parameters_and_buffers(module: nn.Module, eager: nn.Module, rtol: float = 0.0) -> None:
    found = dict(module.named_parameters())
    for name, parameter in eager.named_parameters():
        actual, wanted = found[name].grad, parameter.grad
        assert (actual is None) == (wanted is None), name
        if wanted is not None:
            size = float(wanted.abs().max())
            torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * size, msg=name)
    state = module.state_dict()
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(state[name], buffer, rtol=rtol, atol=rtol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_training_is_the_same(checkpoint: Checkpoint) -> None:
    module = network(checkpoint=checkpoint)
    assert assert_equal(module, images())[-2:] == ["block_forward", "block_forward"]
    assert int(module.features.norm5.num_batches_tracked) == 2


@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_evaluation_is_the_same(grad: bool) -> None:
    module = network(drop_rate=0.5).eval()
    with torch.set_grad_enabled(grad):
        assert_equal(module, images())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_autocast_is_the_same(checkpoint: Checkpoint, backend: Setting) -> None:
    with use_backend(backend):
        module = network(checkpoint=checkpoint, block_config=(1, 1))
        assert "block_forward" in assert_equal(module, images(), amp=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["bottleneck", "block"])
def test_dropout_drops_the_same_values(checkpoint: Checkpoint) -> None:
    assert_equal(network(checkpoint=checkpoint, drop_rate=0.3), images())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (torch.float64, {}),
        (torch.bfloat16, {"small_inputs": True}),
        (torch.float32, {"checkpoint": "auto", "memory_budget": 2**26}),
    ],
    ids=["float64", "bfloat16", "auto"],
)
def test_types_and_budgets(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    input = images(dtype=dtype).requires_grad_()  # as where images are sought, not weights
    assert_equal(network(**kwargs).to(dtype), input, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "marked"])
def test_other_batches_need_no_other_graph(dynamic: bool | None) -> None:
    module = network(block_config=(1, 1))
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count in (2, 5, 3):
        batch = images(count)
        if dynamic is None:
            torch._dynamo.mark_dynamic(batch, 0)
        with torch.compiler.set_stance("fail_on_recompile" if count != 2 else "default"):
            torch.testing.assert_close(run(compiled, batch), run(eager, batch), rtol=0, atol=0)
    same_parameters_and_buffers(module, eager)


@pytest.mark.slow
def test_training_and_evaluation_take_turns() -> None:
    module = network()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for train in (True, False, True):
        module.train(train)
        eager.train(train)
        torch.testing.assert_close(run(compiled, images()), run(eager, images()), rtol=0, atol=0)
    same_parameters_and_buffers(module, eager)


@pytest.mark.slow
def test_inductor() -> None:
    """Its own arithmetic is in the classifier alone; it drops the same values on request."""
    module = network(drop_rate=0.2)
    with torch._inductor.config.patch(fallback_random=True):
        assert_equal(module, images(), steps=1, backend="inductor", rtol=1e-5)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: DenseBlock(2, 8, 2, 4, 0.0),
    "block-none": lambda: DenseBlock(2, 8, 2, 4, 0.0, checkpoint="none"),
    "block-block": lambda: DenseBlock(2, 8, 2, 4, 0.0, checkpoint="block"),
    "layer": lambda: DenseLayer(8, 4, 2, 0.0),
    "transition": lambda: Transition(8, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_parts_alone(part: str) -> None:
    input = torch.randn(2, 8, 7, 5, requires_grad=part != "block")
    assert assert_equal(PARTS[part](), input, steps=1) == ["block_forward"]


def _hook(module: EfficientDenseNet) -> None:
    module.features.denseblock1.denselayer2.register_forward_hook(lambda *of: of[2] * 2)


def _weight_norm(module: EfficientDenseNet) -> None:
    parametrizations.weight_norm(module.features.denseblock2.denselayer1.conv1)


def _freeze(module: EfficientDenseNet) -> None:
    module.features.denseblock1.requires_grad_(False)
    module.features.conv0.requires_grad_(False)
    module.features.denseblock2.denselayer2.norm1.eval()


def _no_running_statistics(module: EfficientDenseNet) -> None:
    norm = module.features.transition1.norm
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def _share(module: EfficientDenseNet) -> None:
    first, second = module.features.denseblock1.values()
    second.norm2 = first.norm2


def _replace(module: EfficientDenseNet) -> None:
    module.features.denseblock1.denselayer1 = nn.Identity()
    module.features.denseblock1.denselayer2 = DenseLayer(8, 8, 2, 0.0)


UNUSUAL: dict[str, tuple[Callable[[EfficientDenseNet], None], int]] = {
    "hook": (_hook, 5),
    "weight norm": (_weight_norm, 3),
    "frozen": (_freeze, 3),
    "no running statistics": (_no_running_statistics, 3),
    "shared norm": (_share, 3),
    "replaced layers": (_replace, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_networks(name: str) -> None:
    """What cannot be fused is called as a module, in the same graph."""
    change, fused = UNUSUAL[name]
    module = network()
    change(module)
    # Plain convolutions of a graph may round otherwise than those outside one.
    rtol = 1e-5 if name == "weight norm" else 0.0
    assert len(assert_equal(module, images(), steps=1, rtol=rtol)) == fused


@pytest.mark.slow
def test_cumulative_averages_break_the_graph_as_anywhere() -> None:
    module = DenseBlock(2, 3, 2, 4, 0.0)
    module.denselayer1.norm2.momentum = None
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(compiled, images()), run(eager, images()))
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(module.state_dict()[name], buffer)


def test_no_graph_breaks() -> None:
    module = network(block_config=(1, 1))
    assert torch._dynamo.explain(module)(images()).graph_break_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_as_much_is_saved_as_in_eager_mode(checkpoint: Checkpoint) -> None:
    module = network(checkpoint=checkpoint, block_config=(3, 3))
    parameters = {parameter.data_ptr() for parameter in module.parameters()}

    def saved(call: Callable[[Tensor], Tensor]) -> list[tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters and tensor.dim():
                found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(images())
        assert output.requires_grad
        return sorted(found.values())

    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(images())
    assert saved(compiled) == saved(module)


@pytest.mark.slow
def test_transforms_within_a_graph() -> None:
    module = DenseBlock(1, 3, 2, 4, 0.0).eval()
    batches = torch.randn(2, 2, 3, 8, 8)
    replaced = {name: value * 0.5 for name, value in module.named_parameters()}

    def call(images: Tensor) -> Tensor:
        return module(images)

    cases: list[Callable[[Tensor], Tensor]] = [
        torch.func.vmap(call),
        lambda given: torch.func.functional_call(module, replaced, (given[0],)),
    ]
    for case in cases:
        compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(batches), case(batches), rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused_as_in_eager_mode() -> None:
    module = DenseBlock(1, 8, 2, 4, 0.0)
    before = copy.deepcopy(module.state_dict())
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(ValueError, match="DenseBlock expects 8 input channels, got 3"):
        compiled(images())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
