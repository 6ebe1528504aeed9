"""Results of an operator held against the reference.

A result may be off by twice what plain PyTorch is off at the same type, both against float64, plus
what the rounding of the stored type and of a sum of that length leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from definitions import DEFINITIONS
from devices import device
from kernel_calls import Call, Calls, Kind, Maker
from torch import Tensor

from densenet_fast.operators.rows import statistics_dtype


def _converted(call: Call, dtype: torch.dtype | None) -> Call:
    """The call in float64, or (None) with weights and their gradients in the images' type."""
    call.arguments = {
        name: _convert(name, value, dtype or call.maker.dtype, everything=dtype is not None)
        for name, value in call.arguments.items()
    }
    return call


def _convert(name: str, value: Any, dtype: torch.dtype, *, everything: bool) -> Any:
    if isinstance(value, list):
        return [_convert(name, one, dtype, everything=everything) for one in value]
    floating = isinstance(value, Tensor) and value.is_floating_point()
    if floating and (everything or name in ("weight", "grad_weight")):
        return value.to(dtype)
    return value


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def differences(
    kind: Kind, call: Call, actual: dict[str, Tensor], plain: dict[str, Tensor], exact: Any
) -> Iterator[str]:
    """What is wrong with the results of one call."""
    for name, result in actual.items():
        if not result.is_floating_point():
            if not torch.equal(result, plain[name]):
                yield f"{name}: {int((result != plain[name]).sum())} elements differ"
            continue
        if not result.isfinite().all():
            where = tuple(int(i) for i in (~result.isfinite()).nonzero()[0])
            yield f"{name}: not finite at {where}"
            continue
        sums = torch.finfo(statistics_dtype(kind.dtype)).eps * call.lengths[name.split()[0]] ** 0.5
        floor = kind.eps + sums
        error, usual = result.double() - exact[name], plain[name].double() - exact[name]
        bounds = (
            ("rms", _rms(error), 2 * _rms(usual) + floor * _rms(exact[name])),
            ("largest", float(error.abs().max()), _largest(usual, floor, exact[name])),
        )
        for what, found, bound in bounds:
            if not found <= bound + 1e-30:
                where = tuple(
                    int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape)
                )
                yield (
                    f"{name}: {what} error {found:.3g}, more than {bound:.3g}; largest at {where}: "
                    f"{float(result[where]):.7g} for {float(exact[name][where]):.7g}"
                )
    for name, of in call.stored.items():
        if name in actual:
            yield from _of_stored_values(kind, name, actual[name], actual[of])


def _largest(usual: Tensor, floor: float, exact: Tensor) -> float:
    return 2 * float(usual.abs().max()) + 2 * floor * float(exact.abs().max())


def _of_stored_values(kind: Kind, name: str, actual: Tensor, rows: Tensor) -> Iterator[str]:
    """Statistics are those of the values as stored, which the backward reads again."""
    values = rows.double().flatten(0, -2)
    size = float(values.abs().max())
    exact = values.mean(0)
    if name == "var":
        exact, size = values.var(0, correction=0), size * size
    eps = torch.finfo(statistics_dtype(kind.dtype)).eps
    error = float((actual.double() - exact).abs().max())
    if not error <= 4 * eps * (len(values) ** 0.5 + 2) * size:
        yield f"{name}: {error:.3g} off the {name} of the stored values"


@lru_cache(maxsize=128)
def _defined(
    kind: Kind, make: Calls, seed: int, layout: str, _: torch.device
) -> list[dict[str, Tensor]]:
    """What the definitions make of a call, in its type and in float64."""
    types = (None, torch.float64)
    return [_converted(make(Maker(kind, seed, layout)), t).run(DEFINITIONS) for t in types]


def check(
    ops: Any, kind: Kind, make: Calls, seed: int = 0, layout: str = "mixed"
) -> dict[str, Tensor]:
    """Run a call with `ops` and hold it against the reference; raises AssertionError."""
    ops.allow_tf32 = kind.tf32
    call = make(Maker(kind, seed, layout))
    actual = call.run(ops)
    plain, exact = _defined(kind, make, seed, layout, device())
    found = list(differences(kind, call, actual, plain, exact))
    assert not found, f"{call.op}: " + "; ".join(found)
    call.maker.assert_guards()
    return actual
