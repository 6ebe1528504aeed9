"""Which parts of a network run fused, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from densenet_fast import reports
from densenet_fast.blocks import autocast
from densenet_fast.conversion.parts import ConvertedFeatures, ConvertedNetwork
from densenet_fast.conversion.structure import ConvertedChain
from densenet_fast.modules import eligibility, fusing, input_checks
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.dimensions import NORMS
from densenet_fast.modules.layers import DenseLayer, FusedBlock, Transition
from densenet_fast.operators.backends import backend_for, get_backend


@dataclass(frozen=True)
class FusionRow(reports.NamedRow):
    """One part of a network. `reason` says why it is not fused, `backend` what computes it."""

    fused: bool
    reason: str | None
    backend: str


@dataclass(frozen=True)
class FusionReport(reports.Report[FusionRow]):
    """What a forward would do now, with inputs of the parameters' dtype and device.

    Iterable over its rows; `str()` gives a table.
    """

    dtype: torch.dtype
    device: torch.device
    note: str | None

    @property
    def all_fused(self) -> bool:
        """Whether nothing runs through its plain modules."""
        return all(row.fused for row in self.rows)

    def __str__(self) -> str:
        fused = sum(row.fused for row in self.rows)
        lines = [f"{fused} of {len(self.rows)} parts run fused ({self.dtype} on {self.device})"]
        if self.note is not None:
            lines.append(f"reference backend: {self.note}")
        rows = [
            (row.name, "fused" if row.fused else "plain", f"{row.backend:<9}", row.reason or "")
            for row in self.rows
        ]
        return "\n".join(lines + reports.table(rows, 4))


def fusion_report(model: nn.Module) -> FusionReport:
    """Every dense layer, transition, stem and final norm below `model`: fused, or why not.

    Valid for this moment: hooks, replaced submodules, autocast and the like are looked at now, as
    every forward does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report expects a module, got {type(model).__name__}")
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype, device = example.dtype, example.device
    backend: str = get_backend()
    note: str | None = "forced"
    if backend != "reference":
        chosen = backend_for(device, autocast.computed_type(dtype, device.type))
        backend, note = chosen.backend if backend == "auto" else backend, chosen.reason
    visitor = _Visitor(dtype, device, backend)
    visitor.visit("", model)
    return FusionReport(tuple(visitor.rows), dtype, device, note)


class _Visitor:
    def __init__(self, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        self.dtype, self.device = dtype, device
        self.rows: list[FusionRow] = []
        self.backend = backend
        self.everywhere = eligibility.autocast(device) or eligibility.surroundings()
        if device.type == "meta":
            self.everywhere = "the parameters are on the meta device"

    def expected(self, owner: nn.Module) -> eligibility.Expected:
        """What the modules of a block or chain are looked at for."""
        return eligibility.Expected(self.dtype, self.device, input_checks.dimensions(owner) or 2)

    def add(self, name: str, found: object, called: str | None = None) -> None:
        """`found` is an obstacle if it is a text; `called` is why the part's module is called."""
        within = self.everywhere or (found if isinstance(found, str) else None)
        reason = within
        if within is None and called is not None:
            reason = f"{called}: called by itself, which is fused within"
        backend = self.backend if within is None else "torch"
        self.rows.append(FusionRow(name, reason is None, reason, backend))

    def visit(self, name: str, module: nn.Module, head: fusing.Head = None) -> None:
        """Rows of what is below `module`; `head` follows it if it is a converted chain."""
        prefix = f"{name}." if name else ""
        if isinstance(module, (DenseLayer, Transition)):
            step = module.step(None, None, self.expected(module))
            self.add(name or type(module).__name__, step, eligibility.touched(module))
        elif isinstance(module, FusedBlock):
            parts = module.parts(self.expected(module))
            for (part, layer), found in zip(module._modules.items(), parts, strict=True):
                if isinstance(layer, DenseLayer) and eligibility.touched(layer) is not None:
                    self.visit(f"{prefix}{part}", layer)
                else:
                    self.add(f"{prefix}{part}", found)
        elif isinstance(module, ConvertedChain):
            for part, obstacle in module.rows(self.expected(module)):
                self.add((prefix + part).rstrip("."), obstacle)
        elif isinstance(module, ConvertedFeatures):
            self.chain(prefix, module, head)
        elif isinstance(module, EfficientDenseNet):
            whole = eligibility.exactly(module.features, nn.Sequential)
            if whole is not None:
                whole = f"features {whole}: its modules are called one by one"
            self.chain(f"{prefix}features.", module.features, "relu and average", whole)
        else:
            for part, child in module._modules.items():
                if child is not None:
                    own = part == "features" and isinstance(module, ConvertedNetwork)
                    behind = module.known_head() if own else None  # type: ignore[operator]
                    self.visit(f"{prefix}{part}", child, behind)

    def chain(
        self, prefix: str, features: nn.Module, head: fusing.Head, whole: str | None = None
    ) -> None:
        """A row for everything that `fusing.steps` could fuse; `whole` is why it fuses nothing."""
        obstacles: dict[int, str] = {}
        modules: dict[str, Any] = features._modules
        expected = self.expected(features)
        fusing.steps(list(modules.values()), expected, head=head, obstacles=obstacles)
        for at, (name, module) in enumerate(modules.items()):
            if isinstance(module, NORMS) or name in ("norm0", "norm5"):
                self.add(prefix + name, whole or obstacles.get(at))
            elif module is not None:
                self.visit(prefix + name, module)  # nothing of ours in it: no rows
