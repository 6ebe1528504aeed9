"""torch.export, ONNX and TorchScript: graphs of standard operators for any batch."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from comparison import tiny as network
from torch import Tensor, nn

from densenet_fast import DenseBlock, DenseLayer, Transition

BATCH = ({0: torch.export.Dim("batch")},)


def images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_standard_operators(strict: bool) -> None:
    module = network().eval()
    program = torch.export.export(module, (images(2),), dynamic_shapes=BATCH, strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert {str(target).split(".")[0] for target in called} == {"aten"}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (2, 5):
        close(loaded(images(count)), module(images(count)))


def test_exported_images_of_any_size() -> None:
    module = network().eval()
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free},)
    program = torch.export.export(module, (images(2),), dynamic_shapes=shapes)
    close(program.module()(images(3, 48, 40)), module(images(3, 48, 40)))


def test_exported_training() -> None:
    """The program updates running statistics and counters as the network does."""
    module = network()
    wanted = copy.deepcopy(module)
    program = torch.export.export(module, (images(2),)).module()
    for _ in range(2):
        close(program(images(2)), wanted(images(2)))
    state = program.state_dict()
    for name, buffer in wanted.named_buffers():
        close(state[name], buffer)
    assert int(state["features.norm5.num_batches_tracked"]) == 2


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module = network().eval()
    path = tmp_path / "network.onnx"
    if dynamo:
        torch.onnx.export(module, (images(2),), path, dynamo=True, dynamic_shapes=BATCH)
    else:
        axes = {"images": {0: "batch"}}
        torch.onnx.export(
            module, (images(2),), path, dynamo=False, input_names=["images"], dynamic_axes=axes
        )
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert all(node.domain in ("", "ai.onnx") for node in model.graph.node)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for count in (2, 5):
        (output,) = session.run(None, {name: images(count).numpy()})
        close(torch.from_numpy(output), module(images(count)).detach())


def test_torchscript_traces(tmp_path: Path) -> None:
    module = network().eval()
    traced = torch.jit.trace(module, images(2))
    traced.save(str(tmp_path / "traced.pt"))
    loaded = torch.jit.load(str(tmp_path / "traced.pt"))
    close(loaded(images(5)), module(images(5)))


def test_symbolic_traces() -> None:
    module = network().eval()
    traced = torch.fx.symbolic_trace(module)
    close(traced(images(5)), module(images(5)))


OURS = {
    "network": lambda: network(drop_rate=0.2),
    "auto": lambda: network(checkpoint="auto", memory_budget=2**30),
    "block": lambda: DenseBlock(2, 3, 2, 4, 0.2),
    "layer": lambda: DenseLayer(3, 4, 2, 0.2),
    "transition": lambda: Transition(3, 2),
    "inside another": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), DenseBlock(1, 4, 2, 4, 0.0)),
}


@pytest.mark.parametrize("symbolically", [False, True], ids=["script", "symbolic trace, script"])
@pytest.mark.parametrize("name", OURS)
def test_scripts(name: str, symbolically: bool, tmp_path: Path) -> None:
    """The program of plain modules, whose parameters it shares; the module stays as it is."""
    module = OURS[name]()
    if symbolically:
        module.eval()  # a trace drops forever what it once dropped
    kinds = [type(part) for part in module.modules()]
    scripted = torch.jit.script(torch.fx.symbolic_trace(module) if symbolically else module)
    assert [type(part) for part in module.modules()] == kinds
    scripted(images(2)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    scripted.eval().save(str(tmp_path / "scripted.pt"))
    loaded = torch.jit.load(str(tmp_path / "scripted.pt"))
    close(loaded(images(5)), module.eval()(images(5)))


def test_scripted_layers_may_have_norms_that_write() -> None:
    layer = DenseLayer(3, 4, 2, 0.0).eval()
    layer.norm1 = nn.SiLU(inplace=True)
    close(torch.jit.script(layer)(images(2)), layer(images(2)))
