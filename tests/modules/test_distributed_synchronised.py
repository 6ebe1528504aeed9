"""Synchronised norms: two ranks compute what one process computes of the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from comparison import SMALL, networks, shake
from processes import ComposedSyncNorm, needs_gloo, run_on_ranks, share
from torch import Tensor, nn

from densenet_fast import EfficientDenseNet, FCDenseNet, fusion_report
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.blocks.stem import stem_norm_relu_maxpool
from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition
from densenet_fast.modules.steps import norm_spec
from densenet_fast.operators import reference
from densenet_fast.operators.backends import use_backend

pytestmark = needs_gloo

IMAGES = (5, 3, 32, 32)
EPSILON = torch.finfo(torch.float32).eps


def made(change: Callable[[nn.Module], None], dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """A network that is the same on every rank."""
    torch.manual_seed(0)
    network = EfficientDenseNet(**{**SMALL, **kwargs}).to(dtype)
    shake(network)
    change(network)
    return network


def converted(network: nn.Module, group: Any = None) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(network, group)


def descend(network: nn.Module, gradients: list[Tensor | None]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.05 * gradient / (1 + gradient.norm())


def assert_as_one_process(
    change: Callable[[nn.Module], None] = lambda network: None,
    *,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, ...] = IMAGES,
    group: Any = None,
    tolerance: float = 1e-9,
    make: Callable[..., nn.Module] = made,
    **kwargs: Any,
) -> None:
    """Two steps of gradient descent by both ranks against one process and the whole batch."""
    whole, ours = make(change, dtype, **kwargs), converted(make(change, dtype, **kwargs), group)
    report = fusion_report(ours)
    assert report.all_fused, report
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        images.requires_grad_()
        part = share(images.detach()).clone().requires_grad_()
        wanted, actual = whole(images), ours(part)
        grad = torch.randn(wanted.shape, generator=generator, dtype=torch.float64).to(dtype)
        close(actual, share(wanted), f"output of step {step}", tolerance)
        whole.zero_grad()
        ours.zero_grad()
        if wanted.requires_grad:
            wanted.backward(grad)
            actual.backward(share(grad))
            close(part.grad, share(images.grad), f"input gradient of step {step}", tolerance)
        largest = max([float(p.grad.norm()) for p in whole.parameters() if p.grad is not None])
        gradients: list[Tensor | None] = []
        for (name, parameter), other in zip(
            ours.named_parameters(), whole.parameters(), strict=True
        ):
            assert (parameter.grad is None) == (other.grad is None), name
            gradients.append(parameter.grad)
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                close(parameter.grad, other.grad, f"gradient of {name}", tolerance, 1e-3 * largest)
        descend(ours, gradients)
        descend(whole, [parameter.grad for parameter in whole.parameters()])
    for (name, buffer), other in zip(ours.named_buffers(), whole.buffers(), strict=True):
        close(buffer, other, name, tolerance, 1e-3)
        everywhere = [torch.empty_like(buffer) for _ in range(2)]
        dist.all_gather(everywhere, buffer)
        assert torch.equal(*everywhere), f"{name} differs between the ranks"


def close(
    actual: Tensor | None, expected: Tensor | None, what: str, tolerance: float, floor: float = 0.0
) -> None:
    assert actual is not None and expected is not None, what
    assert actual.dtype == expected.dtype, what
    error = float((actual - expected).detach().double().norm())
    size = max(float(expected.detach().double().norm()), floor)
    assert error <= tolerance * size, f"{what}: error {error:.3e} against norm {size:.3e}"


# What may be changed about a network


def norms(network: nn.Module) -> list[Any]:
    return [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]


def cumulative(network: nn.Module) -> None:
    for norm in norms(network):
        norm.momentum = None


def without_affine(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                norm = nn.BatchNorm2d(part.num_features, affine=False).to(part.weight.dtype)
                setattr(module, name, norm)


def untracked(network: nn.Module) -> None:
    for norm in norms(network):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def partly_frozen(network: nn.Module) -> None:
    for norm in norms(network)[1::3]:
        norm.eval()
    for parameter in list(network.parameters())[:12:2]:
        parameter.requires_grad_(False)


def frozen_below(network: nn.Module) -> None:
    for parameter in network.features.denseblock1.parameters():
        parameter.requires_grad_(False)
    network.features.conv0.requires_grad_(False)


def halve_every_other_channel(growth: Tensor, seed: int, p: float, channels: bool) -> None:
    growth[..., ::2].mul_(0.5)


def without_stem(change: Callable[[nn.Module], None], dtype: torch.dtype) -> nn.Module:
    """Parts of ours in a network of somebody else's."""
    torch.manual_seed(0)
    network = nn.Sequential(
        DenseLayer(3, 4, 2, 0.0), Transition(7, 6), DenseBlock(2, 6, 2, 4, 0.0)
    ).to(dtype)
    shake(network)
    return network


def for_segmentation(change: Callable[[nn.Module], None], dtype: torch.dtype) -> nn.Module:
    """With a transition that is a node of its own, and a bias in a layer."""
    torch.manual_seed(0)
    network = FCDenseNet(3, 4, (2,), 1, (2,), 6, 0.0)
    network.down_blocks[0].denselayer1.conv1 = nn.Conv2d(6, 4, 3, padding=1)
    network.to(dtype)
    shake(network)
    return network


def networks_on_two_ranks() -> None:
    """Every configuration, one after another."""
    for mode in ("none", "bottleneck", "block"):
        assert_as_one_process(checkpoint=mode)
        # Sums of some thousand float32 numbers through 18 norms: rounding grows by their number.
        assert_as_one_process(checkpoint=mode, dtype=torch.float32, tolerance=18 * 64 * EPSILON)
    assert_as_one_process(checkpoint="auto", memory_budget=2**30)
    assert_as_one_process(cumulative)
    assert_as_one_process(without_affine)
    assert_as_one_process(untracked)
    assert_as_one_process(partly_frozen)
    assert_as_one_process(frozen_below)
    assert_as_one_process(lambda network: network.eval())
    assert_as_one_process(small_inputs=True, size=(5, 3, 8, 8))
    assert_as_one_process(spatial_dims=1, size=(5, 3, 64))
    assert_as_one_process(spatial_dims=3, size=(5, 3, 20, 17, 24))
    for mode in CHECKPOINT_MODES:
        assert_as_one_process(bottleneck=False, checkpoint=mode)
    # The ranks' masks are not those of one process.
    with pytest.MonkeyPatch.context() as patch, use_backend("reference"):
        patch.setattr(reference, "dropout_", halve_every_other_channel)
        for mode in ("bottleneck", "block"):
            assert_as_one_process(drop_rate=0.5, checkpoint=mode)
    assert_as_one_process(make=without_stem, size=(5, 3, 8, 8))
    assert_as_one_process(make=for_segmentation, size=(5, 3, 8, 6))
    both = dist.new_group([0, 1])
    assert_as_one_process(group=both)
    half_width()
    compiled()
    single_values()
    collectives()
    mixed()
    far_from_zero()
    errors(both)


def half_width() -> None:
    """In bfloat16 two ranks are about as far from float64 as one process is."""
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(5, 3, 16, 16, generator=generator).bfloat16()
    results = []
    for dtype, ranks in ((torch.float64, 1), (torch.bfloat16, 1), (torch.bfloat16, 2)):
        network = made(lambda network: None, dtype, checkpoint="block", small_inputs=True)
        network = network if ranks == 1 else converted(network)
        output = network((images if ranks == 1 else share(images)).to(dtype))
        output.square().sum().backward()
        found = torch.cat([p.grad.double().flatten() for p in network.parameters()])
        if ranks > 1:
            dist.all_reduce(found)
        results.append(found)
    exact, one, two = results
    assert (one - exact).norm() <= 0.25 * exact.norm()
    assert (two - exact).norm() <= 2 * (one - exact).norm()


def single_values() -> None:
    """One value per channel on each rank is enough, if there are two ranks."""
    torch.manual_seed(0)
    whole = DenseBlock(1, 3, 2, 4, 0.0).double()
    ours = converted(copy.deepcopy(whole))
    images = torch.arange(6, dtype=torch.float64).reshape(2, 3, 1, 1)
    wanted = share(whole(images), (1, 1))
    for module in (ours, ours.denselayer1):
        close(module(share(images, (1, 1))), wanted, "output", 1e-9)


def collectives() -> None:
    """Two for each layer, one for each block and one for the stem; the same in the backward."""
    counts = {"all_gather": 0, "all_reduce": 0}
    originals = {name: getattr(dist, name) for name in counts}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for mode in ("none", "bottleneck", "block"):
        network = converted(made(lambda network: None, torch.float32, checkpoint=mode))
        counts.update(all_gather=0, all_reduce=0)
        with pytest.MonkeyPatch.context() as patch:
            for name in counts:
                patch.setattr(dist, name, counted(name))
            output = network(share(torch.randn(IMAGES)))
            assert counts == {"all_gather": 2 * 7 + 3 + 1, "all_reduce": 0}, mode
            output.sum().backward()
            assert counts == {"all_gather": 18, "all_reduce": 18}, mode
            network.eval()(share(torch.randn(IMAGES)))
            assert counts == {"all_gather": 18, "all_reduce": 18}, mode


LOCAL, OTHER_GROUP, WORLD = "local", "other group", "world"
MIXTURES: tuple[tuple[dict[str, str], str | None], ...] = (
    ({"denseblock2.denselayer2.norm1": LOCAL}, None),
    ({"denseblock2.denselayer1.norm1": LOCAL, "denseblock2.denselayer2.norm2": LOCAL}, None),
    ({"denseblock2.denselayer3.norm1": OTHER_GROUP, "transition2.norm": LOCAL}, None),
    ({"transition1.norm": OTHER_GROUP, "denseblock3.denselayer2.norm2": OTHER_GROUP}, None),
    ({"norm5": OTHER_GROUP, "norm0": LOCAL}, None),
    ({"norm5": LOCAL}, "takes statistics over other ranks than the block before"),
)


def mixed() -> None:
    """Local and synchronised norms, and those of different groups, side by side."""
    other = dist.new_group([0, 1])
    for mixture, reason in MIXTURES:
        expected, ours = networks()
        for network, kind in ((expected, ComposedSyncNorm), (ours, None)):
            for name, part in list(network.named_modules()):
                if not isinstance(part, nn.BatchNorm2d):
                    continue
                where = mixture.get(name.removeprefix("features."), WORLD)
                if where == LOCAL:
                    continue
                norm = converted(part, other if where == OTHER_GROUP else None)
                parent, _, last = name.rpartition(".")
                setattr(network.get_submodule(parent), last, kind(norm) if kind else norm)
        reasons = [row.reason for row in fusion_report(ours) if not row.fused]
        assert reasons == ([] if reason is None else [reason]), mixture
        images = torch.randn(
            IMAGES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        parts = [share(images).clone().requires_grad_() for _ in range(2)]
        outputs = [net(part) for net, part in zip((expected, ours), parts, strict=True)]
        close(outputs[1], outputs[0], f"output with {mixture}", 1e-9)
        for output in outputs:
            output.square().sum().backward()
        close(parts[1].grad, parts[0].grad, f"input gradient with {mixture}", 1e-9)
        theirs = dict(expected.named_parameters())
        for name, parameter in ours.named_parameters():
            close(parameter.grad, theirs[name].grad, f"gradient of {name}", 1e-9, 1e-3)
        buffers = dict(expected.named_buffers())
        for name, buffer in ours.named_buffers():
            close(buffer, buffers[name], name, 1e-9, 1e-3)


def far_from_zero() -> None:
    """A mean far above the deviation costs no digits but those of the numbers themselves."""
    values = 1e4 + torch.randn(1000, 8, generator=torch.Generator().manual_seed(3))
    part = values.split((300, 700))[dist.get_rank()].double()
    mean, var = part.mean(0).float(), part.var(0, correction=0).float()
    total = torch.empty(1)
    group: Any = dist.group.WORLD
    synchronized.combine(group.group_name, len(part), mean, var, total)
    exact = values.double()
    assert total.item() == 1000
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=2 * EPSILON, atol=0)
    # The ranks' means are rounded to 1e4 * EPSILON, and the variance takes their squares.
    error = 4 * (EPSILON + 1e4 * EPSILON * 0.1)
    torch.testing.assert_close(var.double(), exact.var(0, correction=0), rtol=error, atol=0)


def compiled() -> None:
    """One graph without breaks, fused, in which ranks exchange statistics: eager mode's bits."""
    for checkpoint in ("none", "bottleneck", "block"):
        plain = converted(made(lambda _: None, torch.float32, checkpoint=checkpoint))
        ours = copy.deepcopy(plain)
        nodes: list[str] = []

        def record(graph: torch.fx.GraphModule, _: Any, nodes: list[str] = nodes) -> Any:
            for part in graph.modules():
                if isinstance(part, torch.fx.GraphModule):
                    nodes.extend(str(node.target) for node in part.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        graph = torch.compile(ours, backend=record, fullgraph=True)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            images = share(torch.randn(IMAGES, generator=generator))
            outputs = [plain(images), graph(images)]
            for output in outputs:
                output.square().sum().backward()
            assert torch.equal(*outputs), checkpoint
        for (name, one), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None, name
            assert torch.equal(one.grad, other.grad), name
        for (name, one), other in zip(plain.named_buffers(), ours.buffers(), strict=True):
            assert torch.equal(one, other), name
        fused = [name for name in nodes if name.endswith("block_forward.default")]
        assert len(fused) == 3, nodes
        assert not [name for name in nodes if "batch_norm" in name]


def errors(living: Any) -> None:
    """Refused before anything has changed, on every rank."""
    destroyed = dist.new_group([0, 1])
    dist.destroy_process_group(destroyed)
    elsewhere = dist.new_group([0, 1], backend="cuda:gloo")
    for group, kind, words in (
        (destroyed, RuntimeError, r"features\.norm0 .* has been destroyed"),
        (elsewhere, ValueError, r"features\.norm0 .* on cpu, but .* on cuda \(by gloo\) alone"),
    ):
        network = converted(made(lambda network: None, torch.float32), group)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        part = share(torch.randn(IMAGES))
        with pytest.raises(kind, match=words):
            network(part)
        with pytest.raises(kind, match=r"DenseBlock: denselayer1\.norm1 "):
            network.features.denseblock1(torch.randn(2, 6, 8, 8))
        with pytest.raises(kind, match="DenseLayer: norm1 "):
            network.features.denseblock1.denselayer1(torch.randn(2, 6, 8, 8))
        with pytest.raises(kind, match="Transition: norm "):
            network.features.transition1(torch.randn(2, 14, 8, 8))
        with pytest.raises(kind, match=r"^norm should synchronise"):
            stem_norm_relu_maxpool(torch.randn(2, 6, 8, 8), norm_spec(network.features.norm0, []))
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        network.eval()(part)  # takes no statistics


@pytest.mark.slow
def test_two_ranks() -> None:
    run_on_ranks(networks_on_two_ranks)
