"""Calls of every operator, of any shape, type and memory layout, held against the reference.

A result may be off by twice what plain PyTorch is off at the same type, both against float64, plus
what the rounding of the stored type and of a sum of that length leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from definitions import DEFINITIONS
from devices import device
from op_cases import Case, Norm
from torch import Tensor

from densenet_fast.operators import reference
from densenet_fast.operators.rows import channels_last_format, statistics_dtype

Pixels = tuple[int, ...]  # images, then their one to three sizes


@dataclass(frozen=True)
class Kind:
    """How a kernel computes: the type it stores, and whether products are tf32."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @property
    def eps(self) -> float:
        """The coarsest rounding of a stored value or a factor of a product."""
        return 2.0**-10 if self.tf32 else torch.finfo(self.dtype).eps

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("float16", torch.float16),
    Kind("bfloat16", torch.bfloat16),
    Kind("float32", torch.float32),
    Kind("tf32", torch.float32, tf32=True),
    Kind("float64", torch.float64),
)
HALVES = KINDS[:2]
STORED = tuple(kind for kind in KINDS if not kind.tf32)  # for operators without products

# Where a slice of channels starts and how far apart its rows are, in bytes: `before` it, and a
# pitch that is a multiple of `unit` but of no larger power of two. None: dense.
LAYOUTS: dict[str, tuple[int, int] | None] = {
    "dense": None,
    "pieces": (48, 16),
    "words": (20, 4),
    "elements": (2, 2),
}
LAYOUTS_MIXED = (*LAYOUTS, "mixed")


class Maker(Case):
    """Arguments in a layout; what an operator writes starts as NaN, between guards."""

    def __init__(self, kind: Kind, seed: int = 0, layout: str = "mixed") -> None:
        """Everything follows from the seed."""
        super().__init__(kind.dtype, seed)
        self.channels_last = layout != "dense"  # gradients of weights
        mixed = [name for name in LAYOUTS if name != "dense"]
        self.layouts = cycle(mixed if layout == "mixed" else [layout])

    def rows(self, pixels: tuple[int, ...], channels: int, values: Tensor | None = None) -> Tensor:
        size = torch.empty((), dtype=self.dtype).element_size()
        layout = LAYOUTS[next(self.layouts)]
        self.dense = layout is None
        before, pitch = 0, channels
        if layout is not None:
            unit = max(layout[1] // size, 1)
            before = max(layout[0] // size, 1)
            units = -(-(before + channels + 1) // unit)
            pitch = (units + 1 - units % 2) * unit
        return self.slice_of(pixels, channels, before, pitch, values)

    def slice_of(
        self,
        pixels: tuple[int, ...],
        channels: int,
        before: int,
        pitch: int,
        values: Tensor | None,
    ) -> Tensor:
        """Channels `before` and on of a buffer `pitch` wide; all the rest is guarded."""
        buffer = torch.full((*pixels, pitch), 777.0, dtype=self.dtype, device=device())
        rows = buffer[..., before : before + channels]
        rows.copy_(self.randn(*pixels, channels) if values is None else values)
        self._guarded.append((buffer, before, before + channels))
        return rows

    def result(self, pixels: tuple[int, ...], channels: int) -> Tensor:
        return self.rows(pixels, channels, torch.tensor(torch.nan))

    def results(self, channels: int, *names: str) -> dict[str, Tensor]:
        return {n: self.gradient(channels, dtype=self.statistics) for n in names}

    def gradient(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=device())

    def vectors(self, channels: int, *names: str) -> dict[str, Tensor]:
        return {name: self.vector(channels) for name in names}


def named(norm: Norm) -> dict[str, Tensor]:
    return dict(zip(("scale", "shift", "mean", "rstd"), norm, strict=True))


def act(norm: Norm) -> dict[str, Tensor]:
    return {"scale": norm.scale, "shift": norm.shift}


@dataclass
class Call:
    """An operator, its arguments by name, and the results it writes with their sums' lengths."""

    op: str
    maker: Maker
    arguments: dict[str, Any]
    lengths: dict[str, int]
    stored: dict[str, str] = field(default_factory=dict)  # statistics → the result they are of

    def results(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.lengths:
            value = self.arguments[name]
            if isinstance(value, list):
                found |= {f"{name} {index}": tensor for index, tensor in enumerate(value)}
            elif value is not None:
                found[name] = value
        return found

    def run(self, ops: Any) -> dict[str, Tensor]:
        """Run it with `ops`; the results by name."""
        getattr(ops, self.op)(*self.arguments.values())
        return self.results()


Calls = Callable[[Maker], Call]


def taps(pixels: Pixels) -> tuple[int, ...]:
    """The kernel of a convolution with three taps in each dimension."""
    return (3,) * len(pixels[1:])


def averaged(pixels: Pixels) -> Pixels:
    """Pixels behind a transition."""
    return (pixels[0], *(size // 2 for size in pixels[1:]))


def maxima(pixels: Pixels) -> Pixels:
    """Pixels behind the stem's pooling."""
    return (pixels[0], *((size + 1) // 2 for size in pixels[1:]))


# ---- Convolutions


def forward(
    op: str,
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    statistics: bool = True,
    wide_weight: bool = False,
    linear: bool = False,
) -> Calls:
    """`op` is conv1x1_forward, conv3x3_forward or transition_forward, which may be `linear`."""
    kernel = taps(pixels) if op == "conv3x3_forward" else ()
    transition = op == "transition_forward"
    out_pixels = averaged(pixels) if transition else pixels
    source, out = {
        "conv1x1_forward": ("features", "bottleneck"),
        "conv3x3_forward": ("bottleneck", "growth"),
        "transition_forward": ("features", "out"),
    }[op]

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            source: maker.input(pixels, norm),
            **act(norm),
            "weight": _weight(maker, wide_weight, outputs, channels, *kernel),
            out: maker.result(out_pixels, outputs),
            **(maker.results(outputs, "mean", "var") if statistics else _none("mean", "var")),
            **({"linear": linear} if transition else {}),
        }
        rows = math.prod(out_pixels)
        lengths = {out: channels * math.prod(kernel), "mean": rows, "var": rows}
        return Call(op, maker, arguments, lengths, {"mean": out, "var": out})

    return make


def _none(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _weight(maker: Maker, wide: bool, *shape: int) -> Tensor:
    weight = maker.weight(*shape)
    return weight.float() + 1e-3 * torch.sign(weight.float()) if wide else weight


def _gradients(
    maker: Maker, wanted: str, channels: int, data: str, buffer: Tensor
) -> dict[str, Tensor | None]:
    """The data gradient and the norm's, as `wanted` says: "data", "sums" or "weight" only."""
    sums = maker.results(channels, "grad_gamma", "grad_beta")
    if "data" in wanted:
        return {data: buffer, **sums}
    return {data: None, **(sums if "sums" in wanted else _none("grad_gamma", "grad_beta"))}


def _weight_gradient(maker: Maker, wanted: str, weight: Tensor) -> dict[str, Tensor | None]:
    if "weight" not in wanted:
        return {"grad_weight": None}
    gradient = maker.gradient(*weight.shape, dtype=weight.dtype)
    if maker.channels_last:
        gradient = gradient.contiguous(memory_format=channels_last_format(weight.dim()))
    return {"grad_weight": gradient}


WANTED = ("data weight", "data", "sums", "weight", "sums weight")


def conv1x1_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels)
        arguments = {
            "grad_norm": maker.rows(pixels, outputs),
            "bottleneck": maker.rows(pixels, outputs),
            "coefficients": torch.stack([maker.vector(outputs) for _ in range(3)]),
            "features": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            **_gradients(maker, wanted, channels, "grad_features", maker.rows(pixels, channels)),
            **_weight_gradient(maker, wanted, weight),
        }
        rows = math.prod(pixels)
        sums = {"grad_gamma": rows * outputs, "grad_beta": rows * outputs}
        lengths = {"grad_features": outputs, **sums, "grad_weight": rows}
        return Call("conv1x1_backward", maker, arguments, lengths)

    return make


def conv3x3_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
    accumulate: bool = False,
) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels, *taps(pixels))
        room = maker.rows if accumulate else maker.result
        arguments = {
            "grad_growth": maker.rows(pixels, outputs),
            "bottleneck": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            **_gradients(maker, wanted, channels, "grad_norm", room(pixels, channels)),
            **_weight_gradient(maker, wanted, weight),
            "accumulate": accumulate,
        }
        rows = math.prod(pixels)
        reduced = outputs * math.prod(taps(pixels))
        sums = {"grad_gamma": rows * reduced, "grad_beta": rows * reduced}
        lengths = {"grad_norm": reduced, **sums, "grad_weight": rows}
        return Call("conv3x3_backward", maker, arguments, lengths)

    return make


def transition_backward(
    pixels: Pixels,
    channels: int,
    outputs: int,
    *,
    wanted: str = "data weight",
    wide_weight: bool = False,
    linear: bool = False,
) -> Calls:
    pooled = averaged(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        weight = _weight(maker, wide_weight, outputs, channels)
        arguments = {
            "grad_out": maker.rows(pooled, outputs),
            "features": maker.input(pixels, norm),
            **named(norm),
            "weight": weight,
            "grad_features": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
            **_weight_gradient(maker, wanted, weight),
            "linear": linear,
        }
        rows = math.prod(pixels)
        sums = {"grad_gamma": rows * outputs, "grad_beta": rows * outputs}
        lengths = {"grad_features": outputs, **sums, "grad_weight": rows}
        return Call("transition_backward", maker, arguments, lengths)

    return make


# ---- Operators without products


def channel_statistics(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        rows = math.prod(pixels)
        # A mean far from zero: a sum of squares would lose the variance.
        values = maker.randn(*pixels, channels) + 30
        arguments = {
            "features": maker.rows(pixels, channels, values),
            **maker.results(channels, "mean", "var"),
        }
        return Call("channel_statistics", maker, arguments, {"mean": rows, "var": rows})

    return make


def finish_gradient(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        rows = math.prod(pixels)
        sums = maker.vectors(channels, "mean", "sum_grad", "sum_grad_x")
        arguments = {
            "features": maker.rows(pixels, channels),
            "grad_features": maker.rows(pixels, channels),
            "mean": sums["mean"],
            "sum_grad": sums["sum_grad"] * rows,
            "sum_grad_x": sums["sum_grad_x"] * rows,
            "out": maker.result(pixels, channels),
        }
        return Call("finish_gradient", maker, arguments, {"out": 8})

    return make


def dropout(pixels: Pixels, channels: int, p: float, seed: int = 123456789012345) -> Calls:
    def make(maker: Maker) -> Call:
        arguments = {"growth": maker.rows(pixels, channels), "seed": seed, "p": p}
        return Call("dropout_", maker, arguments, {"growth": 1})

    return make


def avgpool_forward(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "features": maker.input(pixels, norm),
            **act(norm),
            "out": maker.gradient(pixels[0], channels),
        }
        return Call("norm_relu_avgpool_forward", maker, arguments, {"out": math.prod(pixels[1:])})

    return make


def avgpool_backward(pixels: Pixels, channels: int) -> Calls:
    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "grad_out": maker.randn(pixels[0], channels).to(maker.dtype),
            "features": maker.input(pixels, norm),
            **named(norm),
            "grad_features": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
        }
        rows = math.prod(pixels)
        lengths = {"grad_features": 2, "grad_gamma": rows, "grad_beta": rows}
        return Call("norm_relu_avgpool_backward", maker, arguments, lengths)

    return make


def maxpool_forward(pixels: Pixels, channels: int) -> Calls:
    pooled = maxima(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        arguments = {
            "input": maker.input(pixels, norm),
            **act(norm),
            "out": maker.result(pooled, channels),
            "argmax": torch.full((*pooled, channels), 99, dtype=torch.uint8, device=device()),
        }
        return Call("norm_relu_maxpool_forward", maker, arguments, {"out": 2, "argmax": 1})

    return make


def maxpool_backward(pixels: Pixels, channels: int, *, batch_statistics: bool = True) -> Calls:
    pooled = maxima(pixels)

    def make(maker: Maker) -> Call:
        norm = maker.norm(channels)
        images = maker.input(pixels, norm)
        argmax = torch.empty((*pooled, channels), dtype=torch.uint8, device=device())
        out = torch.empty((*pooled, channels), dtype=maker.dtype, device=device())
        reference.norm_relu_maxpool_forward(images, *tuple(norm)[:2], out, argmax)
        arguments = {
            "grad_out": maker.rows(pooled, channels),
            "argmax": argmax,
            "input": images,
            **named(norm),
            "batch_statistics": batch_statistics,
            "grad_input": maker.result(pixels, channels),
            **maker.results(channels, "grad_gamma", "grad_beta"),
        }
        rows = math.prod(pixels)
        lengths = {"grad_input": 4 ** len(pixels[1:]), "grad_gamma": rows, "grad_beta": rows}
        return Call("norm_relu_maxpool_backward", maker, arguments, lengths)

    return make


# ---- Comparison


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
