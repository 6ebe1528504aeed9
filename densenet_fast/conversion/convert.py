"""`convert` and `revert`: others' DenseNets made efficient in place."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import nn

from densenet_fast import arguments
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.conversion.finding import find
from densenet_fast.conversion.parts import (
    ADAPTERS,
    OWN_ATTRIBUTES,
    ConvertedBlock,
    ConvertedFeatures,
    ConvertedNetwork,
    is_converted,
    original,
)
from densenet_fast.conversion.structure import ConvertedChain, become_chain
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import FusedModule
from densenet_fast.reports import NamedRow, Report, table

# The library's module that defines its classes, frozen norms among them → the adapter's name.
_LIBRARIES = {
    "torchvision.models.densenet": "torchvision",
    "torchvision.ops.misc": "torchvision",
    "timm.models.densenet": "timm",
    "timm.layers.norm_act": "timm",
    "monai.networks.nets.densenet": "monai",
    "torchxrayvision.models": "torchxrayvision",
}

_WAS_INPLACE = "_densenet_fast_was_inplace"


@dataclass(frozen=True)
class ConversionRow(NamedRow):
    """One module that `convert` knows: `reason` says why it was left as it is, or None."""

    type: str  # library and class, as it came
    reason: str | None

    @property
    def converted(self) -> bool:
        """Whether the module runs through densenet_fast now."""
        return self.reason is None


@dataclass(frozen=True)
class ConversionReport(Report[ConversionRow]):
    """Every network, block and transition that was found. `str()` gives a table.

    Whether what was converted also runs fused, layer by layer, with the parameters' type, device
    and hooks of now, says `densenet_fast.fusion_report(model)`.
    """

    @property
    def complete(self) -> bool:
        """Whether nothing was left as it is."""
        return all(row.converted for row in self.rows)

    def __str__(self) -> str:
        converted = sum(row.converted for row in self.rows)
        rows = [
            (
                row.name or "(the model)",
                row.type,
                "converted" if row.converted else f"left as it is: {row.reason}",
            )
            for row in self.rows
        ]
        lines = [f"{converted} of {len(self.rows)} parts converted", *table(rows, left=3)]
        return "\n".join(lines)


def convert(
    model: nn.Module, *, checkpoint: Checkpoint = "bottleneck", inplace_relu: bool | None = None
) -> ConversionReport:
    """Make the DenseNets in `model` efficient, in place.

    Knows those of torchvision, timm, MONAI (in one, two and three dimensions) and torchxrayvision,
    alone or inside another model (a detector's or segmentation network's backbone, a wrapper), and
    modules of any class whose forward, traced by torch.fx, is dense layers and transitions.
    Parameters, buffers, names, state-dict keys, hooks and modes stay the very same objects: modules
    get another class, which inherits from their own. Converting again sets another `checkpoint`.

    Args:
        model: any module.
        checkpoint: what blocks keep for the backward: "none", "bottleneck" or "block".
        inplace_relu: False makes every `nn.ReLU` in the model, and the last ReLU of torchvision's
            and torchxrayvision's forward, write its result to memory of its own, as backward hooks
            of attribution tools need it; fused ones write none. None leaves them as they are.

    Returns:
        What was converted, and what was not and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is nothing to convert in it, or `checkpoint` is no mode of a block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert expects a module, got {type(model).__name__}")
    checkpoint = arguments.one_of("checkpoint", checkpoint, CHECKPOINT_MODES)
    if inplace_relu is not None:
        inplace_relu = arguments.flag("inplace_relu", inplace_relu)
    _import_adapters(model)
    rows: dict[nn.Module, ConversionRow] = {}
    planned: dict[nn.Module, type[nn.Module]] = {}
    for name, module in model.named_modules():
        adapter, reason = _plan(module)
        if adapter is not None and reason is None:
            planned[module] = adapter
        if reason is not None or adapter is not None:
            rows[module] = ConversionRow(name, _type_text(module), reason)
    known = {
        module
        for module in model.modules()
        if isinstance(module, (FusedModule, EfficientDenseNet))
        or issubclass(planned.get(module, object), FusedModule)
    }
    found = find(model, known)
    for name, module, _, reason, _ in found:
        if reason is None or module not in rows:
            rows[module] = ConversionRow(name, _type_text(module), reason)
    if not rows:
        raise ValueError(
            f"convert found no dense block in {type(model).__name__}, neither by the classes of "
            "torchvision, timm, MONAI and torchxrayvision nor by what its modules compute"
        )
    for module, adapter in planned.items():
        module.__class__ = adapter
    if inplace_relu is not None:
        _set_relus(model, inplace_relu)
    for match in found:
        if match.chain is not None and match.reason is None:
            become_chain(match.module, match.chain)
    for module in list(model.modules()):
        if isinstance(module, (ConvertedBlock, ConvertedChain)):
            module.checkpoint = checkpoint
        # Plain Sequentials with a converted block among their modules.
        if type(module) is nn.Sequential and any(
            isinstance(child, (ConvertedBlock, ConvertedChain))
            for child in module._modules.values()
        ):
            module.__class__ = ConvertedFeatures
    order = {module: place for place, module in enumerate(model.modules())}
    return ConversionReport(tuple(rows[module] for module in sorted(rows, key=order.__getitem__)))


def revert(model: nn.Module) -> None:
    """Undo `convert`: every converted module gets its own class back.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in it is converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert expects a module, got {type(model).__name__}")
    converted = [module for module in model.modules() if is_converted(module)]
    if not converted:
        raise ValueError(f"revert found nothing converted in {type(model).__name__}")
    for module in model.modules():
        if _WAS_INPLACE in module.__dict__:
            module.__dict__["inplace"] = module.__dict__.pop(_WAS_INPLACE)
    for module in converted:
        module.__class__ = original(module)
        for name in OWN_ATTRIBUTES:
            module.__dict__.pop(name, None)


def _set_relus(model: nn.Module, inplace: bool) -> None:
    for module in model.modules():
        if isinstance(module, ConvertedNetwork):
            module.__dict__["_inplace_relu"] = inplace
        elif isinstance(module, nn.ReLU):
            module.__dict__.setdefault(_WAS_INPLACE, module.inplace)
            module.inplace = inplace


def _import_adapters(model: nn.Module) -> None:
    """Register the adapters of the libraries that the model comes from."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__ in _LIBRARIES:
                library = _LIBRARIES[kind.__module__]
                importlib.import_module(f"densenet_fast.conversion.adapters.{library}")


def _plan(module: nn.Module) -> tuple[type[nn.Module] | None, str | None]:
    """The class that `module` gets, and why it does not; None and None: it is of no interest."""
    kind = type(module)
    if isinstance(module, ConvertedFeatures):
        return None, None
    if isinstance(module, EfficientDenseNet):
        return None, "it is densenet_fast's own network"
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name.lstrip("_") in ("DenseNet", "DenseBlock"):
            return None, "it is a TorchScript module, whose code is fixed: convert before scripting"
        return None, None
    if is_converted(module):
        return kind, None
    if kind in ADAPTERS:
        return ADAPTERS[kind], None
    base = next((base for base in kind.__mro__ if base in ADAPTERS), None)
    if base is None:
        return None, None
    reason = f"it is a subclass of {base.__name__}, which may do anything"
    if issubclass(ADAPTERS[base], ConvertedNetwork):
        reason = (
            f"it is a subclass of {base.__name__} whose forward is its own; blocks and transitions "
            "in it are converted"
        )
    return None, reason


def _type_text(module: nn.Module) -> str:
    origin = original(module)
    return f"{origin.__module__.partition('.')[0]} {origin.__name__}"
