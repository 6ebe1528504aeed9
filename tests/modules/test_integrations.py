"""What PyTorch users do with a network besides calling it: optimisers, averages, copies, tools."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import tiny as network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao import quantization
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from densenet_fast import EfficientDenseNet, fusion_report, memory
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint

LABELS = torch.tensor([0, 1, 2, 0])


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Shapes without values


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_values(kind: str, checkpoint: Checkpoint) -> None:
    context: Any = FakeTensorMode() if kind == "fake" else torch.device("meta")
    with context:
        module = network(checkpoint=checkpoint, drop_rate=0.1)
        output = module(torch.randn(2, 3, 32, 32))
        assert output.shape == (2, 3)
        output.sum().backward()
        report = fusion_report(module)
        found = memory.estimate(module, (2, 3, 32, 32))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
    assert report.all_fused == (kind == "fake")
    wanted = memory.estimate(network(checkpoint=checkpoint, drop_rate=0.1), (2, 3, 32, 32))
    assert found.kept == wanted.kept


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_fake_tensors_are_saved_like_real_ones(checkpoint: Checkpoint) -> None:
    """Shapes, strides and types of everything that waits for the backward, and of gradients."""

    def kept(fake: bool) -> list[Any]:
        found: list[Any] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() > 1:  # all but the way back to the input
                found.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
            return tensor

        mode: Any = FakeTensorMode() if fake else torch.enable_grad()
        with mode:
            module = network(checkpoint=checkpoint)
            given = torch.randn(4, 3, 32, 32, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = module(given)
            output.sum().backward()
        gradients = [parameter.grad for parameter in (given, *module.parameters())]
        shapes = [(tuple(g.shape), g.dtype) for g in gradients if g is not None]
        return [sorted({str(line) for line in found}), shapes]

    assert kept(True) == kept(False)


# Copies


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: _saved(module),
}


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    module = network(checkpoint="block", drop_rate=0.2)
    module(images()).sum().backward()
    made = COPIES[how](module)
    assert made.checkpoint == "block"
    assert fusion_report(made).all_fused
    outputs = []
    for one in (module, made):
        torch.manual_seed(2)
        outputs.append(one(images()))
    assert torch.equal(*outputs)
    for name, buffer in module.named_buffers():
        assert torch.equal(made.state_dict()[name], buffer), name


def test_functional_call() -> None:
    module = network()
    halved = {name: (value * 0.5).detach() for name, value in module.named_parameters()}
    wanted = copy.deepcopy(module)
    wanted.load_state_dict({**module.state_dict(), **halved})
    wanted(images()).sum().backward()
    for value in halved.values():
        value.requires_grad_()
    torch.func.functional_call(module, halved, (images(),)).sum().backward()
    for name, parameter in wanted.named_parameters():
        assert torch.equal(halved[name].grad, parameter.grad), name


def test_gradients_of_every_image() -> None:
    module = network().eval()
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (image[None],)).square().sum()

    every = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images())
    module(images()).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(every[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


# Training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_scaler_skips_what_is_not_finite(dtype: torch.dtype) -> None:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(3):
        before = copy.deepcopy(module.classifier.weight)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(module(images()), LABELS)
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, module.classifier.weight) == (number == 1)
        assert scaler.get_scale() == 2.0 ** (10 if number == 0 else 9)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_images_that_are_not_finite_are_noticed() -> None:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    broken = images()
    broken[0, 0, 0, 0] = float("inf")
    scaler.scale(F.cross_entropy(module(broken), LABELS)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9


def test_memory_formats_do_not_matter() -> None:
    module = network()
    other = copy.deepcopy(module).to(memory_format=torch.channels_last)
    output = module(images())
    same = other(images().to(memory_format=torch.channels_last))
    assert torch.equal(output, same)
    output.sum().backward()
    same.sum().backward()
    for mine, parameter in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, parameter.grad)


def test_averages_of_models() -> None:
    module = network()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    expected = {name: value.double() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for number in range(3):
        optimizer.zero_grad()
        F.cross_entropy(module(images()), LABELS).backward()
        optimizer.step()
        average.update_parameters(module)
        for name, value in module.state_dict().items():
            old = value.double() if number == 0 else expected[name]
            expected[name] = 0.5 * old + 0.5 * value.double()
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert fusion_report(average.module).all_fused
    update_bn([images(), images()], average)
    norm = average.module.features.norm0
    with torch.no_grad():
        features = average.module.features.conv0(images())
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 2
    assert norm.momentum == 0.1


def test_a_training_loop_learns() -> None:
    """With a DataLoader, momentum, a schedule, clipping and what a usual loop has."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    data = torch.randn(24, 3, 32, 32, generator=generator) * 0.5
    data[torch.arange(24), labels] += 1.0
    loader = DataLoader(TensorDataset(data, labels), batch_size=8, shuffle=True)
    torch.manual_seed(0)
    module = EfficientDenseNet(4, (2, 2), 8, num_classes=3, drop_rate=0.1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(8):
        for batch, wanted in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(batch), wanted).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
        schedule.step()
    module.eval()
    with torch.inference_mode():
        assert (module(data).argmax(1) == labels).float().mean() > 0.9


def test_lightning(tmp_path: Path) -> None:
    """Two steps, a checkpoint, and two more steps from there, as four steps at once."""
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            given, wanted = batch
            return F.cross_entropy(self.network(given), wanted)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def fit(module: nn.Module, steps: int, checkpoint: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        # Lightning begins an interrupted epoch anew: all batches are alike here.
        batches = TensorDataset(images().repeat(2, 1, 1, 1), LABELS.repeat(2))
        loader = DataLoader(batches, batch_size=4)
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        assert trainer.global_step == steps
        return trainer

    at_once, first, resumed = Classifier(), Classifier(), Classifier()
    fit(at_once, 4)
    fit(first, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, tmp_path / "half.ckpt")
    state = resumed.state_dict()
    for name, value in at_once.state_dict().items():
        assert torch.equal(state[name], value), name
    assert int(state["network.features.norm5.num_batches_tracked"]) == 4


# Networks that others change


def test_convolutions_take_norms_in() -> None:
    module = network().eval()
    folded = copy.deepcopy(module)
    layer = folded.features.denseblock1.denselayer1
    layer.conv1 = fusion.fuse_conv_bn_eval(layer.conv1, layer.norm2)
    layer.norm2 = nn.Identity()
    folded.features.conv0 = fusion.fuse_conv_bn_eval(folded.features.conv0, folded.features.norm0)
    folded.features.norm0 = nn.Identity()
    torch.testing.assert_close(folded(images()), module(images()), rtol=1e-4, atol=1e-5)
    assert not fusion_report(folded)["features.denseblock1.denselayer1"].fused


def test_parametrisations_and_pruning() -> None:
    module = network()
    first, second = module.features.denseblock1.values()
    parametrizations.weight_norm(first.conv1)
    parametrizations.spectral_norm(module.features.denseblock2.denselayer1.conv2)
    prune.l1_unstructured(second.conv2, "weight", 0.5)
    prune.random_structured(module.features.transition1.conv, "weight", 0.5, dim=0)
    plain = [row.name.split(".")[-1] for row in fusion_report(module) if not row.fused]
    assert plain == ["denselayer1", "denselayer2", "transition1", "denselayer1"]
    module(images()).sum().backward()
    assert first.conv1.parametrizations.weight.original0.grad is not None
    gone = second.conv2.weight == 0
    assert gone.float().mean() == 0.5
    assert bool((second.conv2.weight_orig.grad[gone] == 0).all())
    module.eval()
    before = module(images())
    for conv in (second.conv2, module.features.transition1.conv):
        prune.remove(conv, "weight")
    parametrize.remove_parametrizations(first.conv1, "weight")
    parametrize.remove_parametrizations(module.features.denseblock2.denselayer1.conv2, "weight")
    assert fusion_report(module).all_fused
    torch.testing.assert_close(module(images()), before, rtol=1e-4, atol=1e-5)


needs_engine = pytest.mark.skipif(
    not {"x86", "fbgemm", "qnnpack"} & set(torch.backends.quantized.supported_engines),
    reason="this torch has no quantised kernels",
)
deprecated = pytest.mark.filterwarnings("ignore")


def _near(actual: Tensor, wanted: Tensor) -> None:
    error = (actual - wanted).norm() / wanted.norm()
    assert 0 < error < 0.2


@needs_engine
@deprecated
def test_dynamic_quantisation_of_the_classifier() -> None:
    module = network().eval()
    small = quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert fusion_report(small).all_fused
    assert not isinstance(small.classifier, nn.Linear)
    _near(small(images()), module(images()))


@needs_engine
@deprecated
@pytest.mark.parametrize("training", [False, True], ids=["after training", "in training"])
def test_static_quantisation(training: bool) -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    module = network().eval()
    wanted = module(images())
    if training:
        mapping = quantization.get_default_qat_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_qat_fx(module.train(), mapping, (images(),))
        prepared(images()).sum().backward()
        prepared.eval()
    else:
        mapping = quantization.get_default_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_fx(module, mapping, (images(),))
        prepared(images())
    quantized = quantize_fx.convert_fx(prepared)
    output = quantized(images())
    assert output.shape == wanted.shape
    if not training:
        _near(output, wanted)
        called = [str(node.target) for node in quantized.graph.nodes]
        assert any("quantize_per_tensor" in name for name in called)


@deprecated
def test_fused_modules_of_quantisation() -> None:
    module = network().eval()
    layer = "features.denseblock1.denselayer1"
    groups = [
        ["features.conv0", "features.norm0", "features.relu0"],
        [f"{layer}.conv1", f"{layer}.norm2", f"{layer}.relu2"],
    ]
    fused = quantization.fuse_modules(module, groups)
    torch.testing.assert_close(fused(images()), module(images()), rtol=1e-4, atol=1e-5)
