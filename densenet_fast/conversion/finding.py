"""Where in a model there are chains of dense layers, and why something like them is left alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn

from densenet_fast.conversion.chains import Chain, NoChainError, chain
from densenet_fast.conversion.parts import OWN_ATTRIBUTES
from densenet_fast.conversion.structure import ConvertedChain, steps
from densenet_fast.conversion.traces import UntraceableError, at, bare_copy
from densenet_fast.modules import fusing
from densenet_fast.modules.dimensions import CONVS, INSTANCE_NORMS, OF_TYPE
from densenet_fast.modules.eligibility import Expected, channels_of, is_norm, other_type
from densenet_fast.operators.torch_internals import BatchNorm

# Names that a chain's class must not have, as it would lose them.
_OWN = {name for kind in ConvertedChain.__mro__[:-2] for name in kind.__dict__}
_OWN = {name for name in _OWN if not name.startswith("__")} - set(dir(nn.Module))
_OWN |= {*OWN_ATTRIBUTES}


class Match(NamedTuple):
    """A module that is a chain, or one like it that is not fused, for which `reason` says why."""

    name: str
    module: nn.Module
    chain: Chain | None
    reason: str | None
    dense: bool  # whether there are dense layers in it, not a transition alone


def find(model: nn.Module, known: Collection[nn.Module]) -> list[Match]:
    """The largest chains in `model`, each as the smallest module that it is all of.

    Nothing is looked for in modules that are `known`. Transitions are only found with dense layers.
    """
    found = _find("", model, known)
    return found if any(match.dense for match in found) or known else []


def _find(name: str, module: nn.Module, known: Collection[nn.Module]) -> list[Match]:
    if module in known:
        return []
    children = [
        (f"{name}.{part}" if name else part, child)
        for part, child in module._modules.items()
        if child is not None
    ]
    match = _match(name, module) if _promising(module, known) else None
    if match is not None and match.reason is None:
        whole = [child for child in children if _parts(child[1]) == _parts(module)]
        inner = _find(*whole[0], known) if whole else []
        same = len(inner) == 1 and inner[0].reason is None and inner[0].dense == match.dense
        return inner if same else [match]
    within = [found for child in children for found in _find(*child, known)]
    if match is None or any(found.reason is None and found.dense for found in within):
        return within
    blocks = [found for found in within if found.dense and _several(found.module)]
    return within if blocks else [match]


def _several(module: nn.Module) -> bool:
    """Whether there is more than a single layer in `module`."""
    return sum(isinstance(part, CONVS) for part in module.modules()) > 2


def _match(name: str, module: nn.Module) -> Match | None:
    """What the module is itself; None: nothing of interest."""
    try:
        found = chain(module)
    except NoChainError as error:
        called = type(module).__name__.lower()
        dense = error.dense or "dense" in called
        like = dense or error.like or "transition" in called
        like = like and any(isinstance(part, CONVS) for part in module.modules())
        return Match(name, module, None, str(error), dense) if like else None
    dense = any(stage.layers for stage in found.stages)
    return Match(name, module, found, _refusal(module, found), dense)


def _promising(module: nn.Module, known: Collection[nn.Module]) -> bool:
    """Whether the parameters in `module` are those of norms and convolutions alone."""
    parts = list(module.modules())
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return False
    if any(part in known for part in parts) or not (module._modules and _parts(module)):
        return False
    return all(isinstance(part, _KNOWN) for part in parts if part._parameters)


_KNOWN = (*CONVS, BatchNorm, *INSTANCE_NORMS, nn.GroupNorm, nn.PReLU)


def _parts(module: nn.Module) -> int:
    """How many convolutions and norms there are in it."""
    return sum(isinstance(part, _KNOWN) for part in module.modules())


def _refusal(module: nn.Module, found: Chain) -> str | None:
    """Why a chain is not converted: what fused steps do not have, or other results than its own."""
    taken = sorted(name for name in _OWN if hasattr(module, name))
    if taken:
        return f"it has an attribute {taken[0]!r}, which converted modules have: rename it"
    first = found.stages[0]
    path = first.layers[0].first if first.layers else first.tail.norm  # type: ignore[union-attr]
    norm: Any = at(module, path)
    if not is_norm(norm):
        return f"{'.'.join(path)} {other_type(norm, nn.BatchNorm2d)}"
    try:
        copied = bare_copy(module, tensors=True).eval()
    except UntraceableError as error:
        return str(error)
    meta = any(tensor.is_meta for tensor in copied.parameters())
    device = torch.device("meta" if meta else "cpu")
    copied.to(device, torch.float64)
    expected = Expected(torch.float64, device, _dims(copied, found))
    planned = steps(copied, found, expected, "bottleneck")
    if isinstance(planned, str) or meta:
        return planned if isinstance(planned, str) else None
    generator = torch.Generator().manual_seed(0)
    size = 2 ** sum(stage.tail is not None for stage in found.stages) * 3
    shape = 2, channels_of(norm), *[size] * expected.dims
    images = torch.empty(shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        # Fresh norms are the identity, which hides mistakes.
        for name, tensor in (("", images), *copied.named_parameters(), *copied.named_buffers()):
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
            elif tensor.dim() > 1 and name:
                tensor.div_(tensor[0].numel() ** 0.5)
        try:
            wanted = type(copied).forward(copied, images)
        except Exception as error:
            return f"its forward raises {type(error).__name__} for images of {size} pixels"
        actual = fusing.run(planned, images, hold=False)
    if wanted.shape != actual.shape or not torch.allclose(wanted, actual, rtol=1e-9, atol=1e-9):
        return "fused it gives another output than its own forward"
    return None


def _dims(root: nn.Module, found: Chain) -> int:
    layers, tail = found.stages[-1]
    if tail is not None and tail.conv is None:
        return tail.averaged
    last: Any = layers[-1].conv2 if tail is None else tail.conv
    return OF_TYPE.get(type(at(root, last)), 2)
