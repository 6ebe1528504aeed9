"""Which parts of a network run fused, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from densenet_fast.blocks import autocast
from densenet_fast.conversion.parts import ConvertedFeatures, ConvertedNetwork
from densenet_fast.modules import eligibility, fusing
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseLayer, FusedBlock, Transition, fusable_parts
from densenet_fast.operators.backends import backend_for, get_backend


@dataclass(frozen=True)
class FusionRow:
    """One part of a network. `reason` says why it is not fused, `backend` what computes it."""

    name: str
    fused: bool
    reason: str | None
    backend: str


@dataclass(frozen=True)
class FusionReport:
    """What a forward would do now, with inputs of the parameters' dtype and device.

    Iterable over its rows; `str()` gives a table.
    """

    rows: tuple[FusionRow, ...]
    dtype: torch.dtype
    device: torch.device
    note: str | None

    @property
    def all_fused(self) -> bool:
        """Whether nothing runs through its plain modules."""
        return all(row.fused for row in self.rows)

    def __iter__(self) -> Iterator[FusionRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> FusionRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        fused = sum(row.fused for row in self.rows)
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{fused} of {len(self.rows)} parts run fused ({self.dtype} on {self.device})"]
        if self.note is not None:
            lines.append(f"reference backend: {self.note}")
        for row in self.rows:
            how = "fused" if row.fused else "plain"
            reason = "" if row.reason is None else f"  {row.reason}"
            lines.append(f"{row.name:<{width}}  {how}  {row.backend:<9}{reason}".rstrip())
        return "\n".join(lines)


def fusion_report(model: nn.Module) -> FusionReport:
    """Every dense layer, transition, stem and final norm below `model`: fused, or why not.

    Valid for this moment: hooks, replaced submodules, autocast and the like are looked at now, as
    every forward does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report expects a module, got {type(model).__name__}")
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    report = _Report(example.dtype, example.device)
    report.visit("", model)
    forced = get_backend() == "reference"
    computed = autocast.computed_type(example.dtype, example.device.type)
    note = "forced" if forced else backend_for(example.device, computed).reason
    return FusionReport(tuple(report.rows), example.dtype, example.device, note)


class _Report:
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.where = (dtype, device)
        self.rows: list[FusionRow] = []
        forced = get_backend()
        computed = autocast.computed_type(dtype, device.type)
        chosen = backend_for(device, computed).backend if forced == "auto" else forced
        self.backend = str(chosen)
        self.everywhere = eligibility.autocast(device) or eligibility.surroundings()
        if device.type == "meta":
            self.everywhere = "the parameters are on the meta device"

    def add(self, name: str, obstacle: str | None, called: str | None = None) -> None:
        """`obstacle` is inside the part, `called` is why it must be called as a module."""
        within = self.everywhere or obstacle
        reason = within
        if within is None and called is not None:
            reason = f"{called}: called by itself, which is fused within"
        backend = self.backend if within is None else "torch"
        self.rows.append(FusionRow(name, reason is None, reason, backend))

    def visit(self, name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(module, EfficientDenseNet):
            self.network(prefix, module)
        elif isinstance(module, ConvertedNetwork):
            self.converted(prefix, module)
        elif isinstance(module, ConvertedFeatures):
            self.features(prefix, module, None)
        elif isinstance(module, FusedBlock):
            self.block(prefix, module)
        elif isinstance(module, DenseLayer):
            self.layer(name or type(module).__name__, module)
        elif isinstance(module, Transition):
            self.transition(name or type(module).__name__, module)
        else:
            for part, child in module._modules.items():
                if child is not None:
                    self.visit(f"{prefix}{part}", child)

    def layer(self, name: str, layer: DenseLayer) -> None:
        channels = getattr(layer._modules.get("norm1"), "num_features", 0)
        self.add(name, layer.obstacle(channels, *self.where), eligibility.touched(layer))

    def transition(self, name: str, transition: Transition) -> None:
        obstacle = transition.obstacle(None, *self.where)
        self.add(name, obstacle, eligibility.touched(transition))

    def block(self, prefix: str, block: FusedBlock) -> None:
        channels: int | None = None
        for name, layer in zip(block._modules, block.layers(), strict=True):
            channels, found = fusable_parts(layer, channels, *self.where)
            if isinstance(layer, DenseLayer) and eligibility.touched(layer) is not None:
                self.layer(f"{prefix}{name}", layer)
            else:
                self.add(f"{prefix}{name}", found if isinstance(found, str) else None)

    def network(self, prefix: str, model: EfficientDenseNet) -> None:
        whole = eligibility.exactly(model.features, nn.Sequential)
        if whole is not None:
            whole = f"features {whole}: its modules are called one by one"
        self.walk(f"{prefix}features.", model.features, whole, fusing.final_norm_obstacle)

    def converted(self, prefix: str, model: ConvertedNetwork) -> None:
        """A converted network's features, and behind them what `visit` finds."""
        known = model.head_is_known()
        for name, child in model._modules.items():
            if isinstance(child, ConvertedFeatures) and name == "features":
                self.features(f"{prefix}features.", child, model.final if known else None)
            elif child is not None:
                self.visit(f"{prefix}{name}", child)

    def features(
        self, prefix: str, features: ConvertedFeatures, final: fusing.FinalObstacle | None
    ) -> None:
        self.walk(prefix, features, None, None if eligibility.touched(features) else final)

    def walk(
        self,
        prefix: str,
        features: nn.Module,
        whole: str | None,
        final: fusing.FinalObstacle | None,
    ) -> None:
        """The same walk as `fusing.steps`, with a row for everything that could be fused."""
        parts: list[Any] = list(features._modules.items())
        modules = [module for _, module in parts]
        for at, (name, module) in enumerate(parts):
            if isinstance(module, eligibility.NORMS) or name in ("norm0", "norm5"):
                self.add(prefix + name, whole or self._norm(modules, at, final))
            elif module is not None:
                self.visit(prefix + name, module)  # nothing of ours in it: no rows

    def _norm(
        self, modules: list[nn.Module], at: int, final: fusing.FinalObstacle | None
    ) -> str | None:
        if at + 1 < len(modules):
            return fusing.stem_obstacle(modules[at:], *self.where)
        if fusing.stands_alone(modules, at, *self.where, final):
            return None
        before = modules[at - 1] if at else None
        if not isinstance(before, FusedBlock):
            return "is not behind a DenseBlock"
        if (found := fusing.block_obstacle(before)) is not None:
            return f"the block before it {found}"
        segments = before.segments(None, *self.where)
        if not segments or isinstance(segments[-1], nn.Module):
            return "the layer before it runs plain"
        if final is None:
            return "what follows it is not known to be ReLU and the average over all pixels"
        found = final(modules[at], *self.where)
        return found or fusing.group_obstacle(segments, modules[at])
