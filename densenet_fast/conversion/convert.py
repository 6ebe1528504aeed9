"""`convert` and `revert`: other libraries' DenseNets made efficient in place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from densenet_fast import arguments
from densenet_fast.blocks.specs import CHECKPOINT_MODES, Checkpoint
from densenet_fast.conversion.parts import (
    OWN_ATTRIBUTES,
    ConvertedBlock,
    ConvertedFeatures,
    ConvertedNetwork,
    is_converted,
)
from densenet_fast.conversion.report import ConversionReport, ConversionRow
from densenet_fast.modules.densenet import EfficientDenseNet

# The library's module that defines the classes → the adapter's name.
_LIBRARIES = {
    "torchvision.models.densenet": "torchvision",
    "timm.models.densenet": "timm",
    "monai.networks.nets.densenet": "monai",
    "torchxrayvision.models": "torchxrayvision",
}


def convert(model: nn.Module, *, checkpoint: Checkpoint = "bottleneck") -> ConversionReport:
    """Make the DenseNets in `model` efficient, in place.

    Knows those of torchvision, timm, MONAI (2-D) and torchxrayvision, alone or inside another model
    (a detector's or segmentation network's backbone, a wrapper). Parameters, buffers, names,
    state-dict keys, hooks and modes stay the very same objects: modules get another class, which
    inherits from their own. Converting again sets another `checkpoint`.

    Args:
        model: any module.
        checkpoint: what blocks keep for the backward: "none", "bottleneck" or "block".

    Returns:
        What was converted, and what was not and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is nothing to convert in it, or `checkpoint` is no mode of a block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert expects a module, got {type(model).__name__}")
    checkpoint = arguments.one_of("checkpoint", checkpoint, CHECKPOINT_MODES)
    adapters = _adapters(model)
    rows: list[ConversionRow] = []
    planned: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in model.named_modules():
        found = _plan(module, adapters)
        if found is None:
            continue
        adapter, reason = found
        rows.append(ConversionRow(name, _type_text(module), reason))
        if adapter is not None:
            planned.append((module, adapter))
    if not rows:
        raise ValueError(
            f"convert found no DenseNet of torchvision, timm, MONAI or torchxrayvision in "
            f"{type(model).__name__}"
        )
    for module, adapter in planned:
        module.__class__ = adapter
    for module in model.modules():
        if isinstance(module, ConvertedBlock):
            module.checkpoint = checkpoint
    for module in _chains(model):
        module.__class__ = ConvertedFeatures
    return ConversionReport(tuple(rows))


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
    for module in converted:
        module.__class__ = type(module).__dict__["converted_from"]
        for name in OWN_ATTRIBUTES:
            module.__dict__.pop(name, None)


def _adapters(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    """Adapters by the library's class, for the libraries that the model comes from."""
    names = {
        _LIBRARIES[kind.__module__]
        for module in model.modules()
        for kind in type(module).__mro__
        if kind.__module__ in _LIBRARIES
    }
    return {
        adapter.__dict__["converted_from"]: adapter
        for name in sorted(names)
        for adapter in _library(name).ADAPTERS
    }


def _library(name: str) -> ModuleType:
    return importlib.import_module(f"densenet_fast.conversion.adapters.{name}")


def _plan(
    module: nn.Module, adapters: dict[type[nn.Module], type[nn.Module]]
) -> tuple[type[nn.Module] | None, str | None] | None:
    """The class that `module` gets, and why it gets none; None for modules of no interest."""
    kind = type(module)
    if is_converted(module):
        return None if isinstance(module, ConvertedFeatures) else (None, None)
    if isinstance(module, EfficientDenseNet):
        return None, "it is densenet_fast's own network"
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name.lstrip("_") in ("DenseNet", "DenseBlock"):
            return None, "it is a TorchScript module, whose code is fixed: convert before scripting"
        return None
    adapter = adapters.get(kind)
    if adapter is not None:
        reason = _dimensions(module)
        return (adapter, None) if reason is None else (None, reason)
    base = next((base for base in kind.__mro__ if base in adapters), None)
    if base is None:
        return None
    if issubclass(adapters[base], ConvertedNetwork):
        return None, (
            f"it is a subclass of {base.__name__} whose forward is its own; blocks and transitions "
            "in it are converted"
        )
    return None, f"it is a subclass of {base.__name__}, which may do anything"


def _dimensions(module: nn.Module) -> str | None:
    """Why the convolutions below are none of images, or None."""
    for part in module.modules():
        for kind, text in ((nn.Conv1d, "1-D"), (nn.Conv3d, "3-D")):
            if isinstance(part, kind):
                return f"its convolutions are {text}: only 2-D networks are supported"
    return None


def _chains(model: nn.Module) -> Iterator[nn.Module]:
    """Plain Sequentials with a converted block among their modules."""
    for module in list(model.modules()):
        if type(module) is nn.Sequential and any(
            isinstance(child, ConvertedBlock) for child in module._modules.values()
        ):
            yield module


def _type_text(module: nn.Module) -> str:
    kind = type(module)
    origin = kind.__dict__.get("converted_from", kind)
    return f"{origin.__module__.partition('.')[0]} {origin.__name__}"
