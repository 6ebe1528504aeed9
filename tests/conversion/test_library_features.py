"""Every library's converted network with PyTorch's features: what it was before, it is after.

The table in docs/pytorch-features.md has a row for each test here.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from densenet_fast import EfficientDenseNet, convert, fusion_report, revert

CLASSES = 5
SHAPE = (4, 3, 32, 32)


def _ours() -> nn.Module:
    return EfficientDenseNet(8, (2, 3), 16, num_classes=CLASSES)


def _torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.DenseNet(8, (2, 3), 16, num_classes=CLASSES)


def _timm() -> nn.Module:
    densenet = pytest.importorskip("timm.models.densenet")
    return densenet.DenseNet(8, (2, 3), num_classes=CLASSES)


def _monai() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.DenseNet(2, 3, CLASSES, 16, 8, (2, 3))


def _torchxrayvision() -> nn.Module:
    xrv = pytest.importorskip("torchxrayvision.models")
    return xrv.DenseNet(8, (2, 3), 16, num_classes=CLASSES, in_channels=3)


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "densenet_fast": _ours,
    "torchvision": _torchvision,
    "timm": _timm,
    "monai": _monai,
    "torchxrayvision": _torchxrayvision,
}
every_library = pytest.mark.parametrize("library", LIBRARIES)


def pair(library: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The library's network made efficient, and the same network as it was."""
    torch.manual_seed(0)
    model = LIBRARIES[library]().to(dtype)
    if library == "densenet_fast":
        reference = _torchvision().to(dtype)
        reference.load_state_dict(model.state_dict())
        return model, reference
    reference = copy.deepcopy(model)
    assert convert(model).complete
    return model, reference


def images(dtype: torch.dtype = torch.float64, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, *SHAPE[1:]), generator=generator, dtype=torch.float64).to(dtype)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss


def assert_same_gradients(one: nn.Module, other: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert left.grad is not None and right.grad is not None, name
        torch.testing.assert_close(left.grad, right.grad, rtol=tolerance, atol=tolerance)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@every_library
def test_autocast_bfloat16(library: str) -> None:
    model, reference = pair(library, torch.float32)
    x = images(torch.float32)
    exact = copy.deepcopy(reference).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), reference(x)
        assert fusion_report(model).all_fused
    assert ours.dtype == theirs.dtype
    assert relative(ours, exact) <= 2 * relative(theirs, exact) + 2**-8
    ours.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@every_library
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_float16_with_a_gradient_scaler(library: str) -> None:
    model, _ = pair(library, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = model(images(torch.float32)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**8  # nothing overflowed
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # A gradient that is no number skips the step and lowers the scale.
    before = [p.clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(images(torch.float32)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**8
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@every_library
def test_channels_last_or_not(library: str) -> None:
    model, _ = pair(library)
    outputs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        copied = copy.deepcopy(model).to(memory_format=layout)
        outputs.append(copied(images().contiguous(memory_format=layout)))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@every_library
def test_functional_call(library: str) -> None:
    model, reference = pair(library)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    doubled = {name: t * 2 if t.is_floating_point() else t.clone() for name, t in tensors.items()}
    output = torch.func.functional_call(model, doubled, (images(),))
    names = dict(reference.named_parameters()).keys() | dict(reference.named_buffers()).keys()
    expected = torch.func.functional_call(reference, {n: doubled[n] for n in names}, (images(),))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@every_library
def test_moving_average(library: str) -> None:
    model, _ = pair(library)
    average = AveragedModel(model, use_buffers=True)
    model(images())
    average.update_parameters(model)
    model.eval()
    average.eval()
    torch.testing.assert_close(average(images()), model(images()), rtol=1e-12, atol=1e-12)


@every_library
def test_a_checkpoint_of_training(library: str) -> None:
    model, reference = pair(library)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (model, reference)]
    step(model, images())
    optimizers[0].step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizers[0].state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    reference.load_state_dict(state["model"])
    optimizers[1].load_state_dict(state["optimizer"])
    for network, optimizer in zip((model, reference), optimizers, strict=True):
        optimizer.zero_grad()
        step(network, images())
        optimizer.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@every_library
def test_compiled_as_one_graph(library: str) -> None:
    model, reference = pair(library)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        step(compiled, images()), step(reference, images()), rtol=1e-10, atol=1e-10
    )
    assert_same_gradients(model, reference)
    for one, other in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    model.eval()
    reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), reference(images()), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@every_library
def test_onnx(library: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, reference = pair(library, torch.float32)
    for network in (model, reference):
        network.eval()
    x = images(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(output), reference(x).detach(), rtol=1e-4, atol=1e-5
    )


@every_library
def test_quantised_classifier(library: str) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch has no engine for quantised operators")
    model, _ = pair(library, torch.float32)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert relative(quantised(images(torch.float32)), model(images(torch.float32))) < 0.05


@every_library
def test_synchronised_norms_of_one_process(library: str) -> None:
    if library == "timm":
        pytest.skip("timm's norms have their own conversion: test_timm_synchronised_norms")
    model, reference = pair(library)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(
        step(model, images()), step(reference, images()), rtol=1e-10, atol=1e-10
    )
    assert_same_gradients(model, reference)
    assert fusion_report(model).all_fused


def test_timm_synchronised_norms_run_plain() -> None:
    layers = pytest.importorskip("timm.layers")
    model, _ = pair("timm")
    model = layers.convert_sync_batchnorm(model)
    rows = [row for row in fusion_report(model) if "denselayer" in row.name]
    assert rows and not any(row.fused for row in rows)
    assert rows[0].reason == "norm1 is a SyncBatchNormAct, not a BatchNormAct2d"


@every_library
def test_reverting_gives_the_librarys_results(library: str) -> None:
    if library == "densenet_fast":
        pytest.skip("nothing to revert")
    model, reference = pair(library)
    model(images())
    reference(images())
    revert(model)
    assert torch.equal(model.eval()(images()), copy.deepcopy(model)(images()))
    torch.testing.assert_close(model(images()), reference.eval()(images()), rtol=1e-9, atol=1e-9)


# Two processes


def _one_of_two_processes(libraries: list[str]) -> None:
    for library in libraries:
        model, reference = pair(library)
        wrapped = DistributedDataParallel(model)
        part = images().chunk(2)[dist.get_rank()]
        step(wrapped, part)
        # Each rank's norms take the statistics of its own part, and gradients are averaged.
        for half in images().chunk(2):
            (reference(half).square().mean() / 2).backward()
        assert_same_gradients(model, reference)
        assert fusion_report(model).all_fused


def _compiled_and_synchronised() -> None:
    model, _ = pair("densenet_fast")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    eager = copy.deepcopy(model)
    part = images(count=5).split((2, 3))[dist.get_rank()]
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(step(compiled, part), step(eager, part))
    assert_same_gradients(model, eager)
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@needs_gloo
def test_exchanges_between_ranks_leave_the_graph() -> None:
    run_on_ranks(_compiled_and_synchronised)


@pytest.mark.slow
@needs_gloo
def test_two_processes_against_one() -> None:
    libraries = []
    for library, make in LIBRARIES.items():
        try:
            make()
        except pytest.skip.Exception:
            continue
        libraries.append(library)
    run_on_ranks(_one_of_two_processes, libraries)
