"""The modules under PyTorch's own machinery around autograd and parallel training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from comparison import (
    assert_close,
    assert_same_gradients,
    assert_same_state,
    blocks,
    gradient_of,
    networks,
    replica,
)
from torch import Tensor, nn

from densenet_fast import convert
from densenet_fast.fusion import fusion_report
from densenet_fast.modules import eligibility
from densenet_fast.modules.layers import DenseBlock

MODES = ("none", "bottleneck", "block")


@pytest.mark.parametrize("checkpoint", MODES)
def test_the_output_may_be_written_to(checkpoint: str) -> None:
    """Also where autograd does not see it."""
    expected, ours = blocks(2, 4, 2, 3, checkpoint=checkpoint)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for block in (expected, ours):
        output = block(images).relu_()
        output.data[:, 3] = 0
        output.detach().numpy()[:, 1] += 1
        output.square().sum().backward()
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("checkpoint", MODES)
def test_the_input_may_be_written_to_afterwards(checkpoint: str) -> None:
    expected, ours = blocks(2, 4, 2, 3, checkpoint=checkpoint)
    start = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for block in (expected, ours):
        images = 2 * start
        output = block(images)
        images.mul_(3)
        (output.square().sum() + images.sum()).backward()
        gradients.append(start.grad)
        start.grad = None
    assert_same_gradients(ours, expected)
    assert_close(gradients[1], gradients[0], "gradient of the input")


def test_torch_checkpoint_around_a_block() -> None:
    expected, ours = blocks(2, 4, 2, 3)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    for block in (expected, ours):
        output = torch.utils.checkpoint.checkpoint(block, images, use_reentrant=False)
        output.square().sum().backward()
    assert_same_gradients(ours, expected)
    assert_same_state(ours, expected)  # updated twice, by both


NETWORKS: dict[str, dict[str, Any]] = {
    "the stem recomputes": {},
    "the stem keeps": {"checkpoint": "none"},
    "small inputs": {"small_inputs": True},
    "converted features": {},
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_checkpoint_around_a_network(name: str, reentrant: bool) -> None:
    other, network = networks(drop_rate=0.2, **NETWORKS[name])
    if name == "converted features":
        assert convert(other).complete
        network = other.features
    plain = copy.deepcopy(network)
    values = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    images, same = values.clone().requires_grad_(), values.clone().requires_grad_()
    torch.manual_seed(1)
    output = torch.utils.checkpoint.checkpoint(network, images, use_reentrant=reentrant)
    torch.manual_seed(1)
    expected = plain(same)
    assert_close(output, expected, "output")
    output.backward(gradient_of(output))
    expected.backward(gradient_of(expected))
    assert images.grad is not None and same.grad is not None
    assert_close(images.grad, same.grad, "input gradient")
    assert_same_gradients(network, plain)


@pytest.mark.parametrize("checkpoint", MODES)
def test_second_derivatives_are_refused_under_torch_checkpoint(checkpoint: str) -> None:
    _, network = networks(checkpoint=checkpoint)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    output = torch.utils.checkpoint.checkpoint(network, images, use_reentrant=False)
    [gradient] = torch.autograd.grad(output.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


def test_tensors_saved_on_another_device() -> None:
    expected, ours = blocks(2, 4, 2, 3)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected(images).square().sum().backward()
    with torch.autograd.graph.save_on_cpu():
        output = ours(images)
    output.square().sum().backward()
    assert_same_gradients(ours, expected)


def test_parameters_changed_before_the_backward_are_noticed() -> None:
    block = DenseBlock(2, 4, 2, 3, 0.0)
    output = block(torch.randn(2, 4, 5, 5)).sum()
    with torch.no_grad():
        block.denselayer2.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_replicas_of_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, ours = networks()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    copied = replica(ours)
    layer = copied.features.denseblock1.denselayer1
    assert not isinstance(layer.step(None, 6, eligibility.expected(images)), str)
    expected(images).square().sum().backward()
    copied(images).square().sum().backward()
    assert_same_gradients(ours, expected)
    assert_same_state(ours, expected)


def test_observed_for_quantisation() -> None:
    """Observers are forward hooks, quantisation-aware convolutions are subclasses."""
    quantization = pytest.importorskip("torch.ao.quantization")
    network = networks()[1].float().eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = network(images)
    conv = network.features.denseblock1.denselayer1.conv1
    conv.qconfig = quantization.get_default_qconfig("fbgemm")
    observed = quantization.prepare(network)
    report = fusion_report(observed)
    assert [row.name for row in report if not row.fused] == ["features.denseblock1.denselayer1"]
    torch.testing.assert_close(observed(images), wanted)

    network = copy.deepcopy(network).train()
    trained = quantization.prepare_qat(network)
    trained(images).sum().backward()
    assert not fusion_report(trained)["features.denseblock1.denselayer1"].fused


def test_one_process_of_distributed_training(tmp_path: object) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    expected, ours = networks()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected(images).square().sum().backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        wrapped(images).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_gradients(ours, expected)


def test_gradient_of_the_input_alone() -> None:
    expected, ours = blocks(2, 4, 2, 3)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)

    def gradient(block: nn.Module) -> Tensor:
        return torch.autograd.grad(block(images).square().sum(), images)[0]

    assert_close(gradient(ours), gradient(expected), "input gradient")
    assert all(parameter.grad is None for parameter in ours.parameters())
