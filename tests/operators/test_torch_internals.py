"""What is private in PyTorch and used here is still there, and means what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from densenet_fast.operators import torch_internals


def test_hooks_on_all_modules() -> None:
    assert torch_internals.altered() is None
    for register in (
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        assert torch_internals.altered() == "hooks on all modules are registered"
        handle.remove()
        assert torch_internals.altered() is None


def test_transforms() -> None:
    seen: list[str | None] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_internals.altered())
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    assert seen == [None, *2 * ["a torch.func transform is active"]]


def test_forward_mode() -> None:
    assert torch_internals.altered() is None
    with forward_ad.dual_level():
        assert torch_internals.altered() == "forward-mode differentiation is active"
    assert torch_internals.altered() is None


def test_hooks_of_a_gradient() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert not getattr(parameter, torch_internals.GRADIENT_HOOKS)
    handle = parameter.register_post_accumulate_grad_hook(lambda _: None)
    assert getattr(parameter, torch_internals.GRADIENT_HOOKS)
    handle.remove()
    assert not getattr(parameter, torch_internals.GRADIENT_HOOKS)


def test_classes() -> None:
    assert issubclass(nn.BatchNorm2d, torch_internals.BatchNorm)
    assert issubclass(nn.InstanceNorm2d, torch_internals.InstanceNorm)
    assert nn.BatchNorm2d.forward is torch_internals.BatchNorm.forward
    assert nn.InstanceNorm2d.forward is torch_internals.InstanceNorm.forward
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert type(torch.ones(2)) is torch_internals.FakeTensor


def test_memory_formats() -> None:
    images = torch.ones(2, 3, 4, 5)
    assert torch_internals.suggest_memory_format(images) == torch.contiguous_format
    inside = images.contiguous(memory_format=torch.channels_last)
    assert torch_internals.suggest_memory_format(inside) == torch.channels_last


def test_convolutions() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")
    images = torch.rand(1, 3, 4, 4)
    found = torch_internals.conv_forward(conv, images, 2 * conv.weight, None)
    torch.testing.assert_close(found, 2 * (conv(images) - conv.bias.view(-1, 1, 1)))  # type: ignore[union-attr]


def test_process_groups(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group: Any = dist.group.WORLD
        assert torch_internals.process_group(group.group_name) is group
    finally:
        dist.destroy_process_group()
    with pytest.raises((KeyError, LookupError, RuntimeError, ValueError)):
        torch_internals.process_group("none of this name")


def test_names_in_pickles() -> None:
    allowed: dict[str, Any] = torch_internals.allowed_globals()
    assert allowed["torch._utils._rebuild_tensor_v2"] is torch._utils._rebuild_tensor_v2
    assert "builtins.eval" not in allowed
    assert torch_internals.IMPORT_MAPPING["__builtin__"] == "builtins"
    assert torch_internals.NAME_MAPPING["__builtin__", "xrange"] == ("builtins", "range")
