"""Arguments of the block operators for blocks of any kind, and both ways to run one.

In what an operator should write everything is NaN before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from op_cases import Case
from ops_arguments import tensors
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators import reference, reference_block

NAN = torch.tensor(torch.nan)
ALL = (True, True, True, True)


@dataclass(frozen=True)
class BlockCase:
    """A block of layers and what is wanted of it; norm 2 l + n is norm n + 1 of layer l.

    A layer of width 0 has no bottleneck, norm1 and conv1.
    """

    pixels: tuple[int, ...] = (2, 3, 4)
    channels: int = 5
    growths: tuple[int, ...] = (3, 2, 4)
    widths: tuple[int, ...] = (8, 4, 6)
    frozen: tuple[int, ...] = ()
    plain: tuple[int, ...] = ()  # norms without weight and bias
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    wide: bool = False  # float32 weights
    channels_last: bool = False  # of the weights
    tail: bool = True  # a norm of all features, with statistics of the batch
    recompute: bool = False
    held: int = 0
    lowest: int = -1
    # Of norm1, conv1, norm2 and conv2 of each layer, whether they want gradients.
    needs: tuple[tuple[bool, bool, bool, bool], ...] = (ALL, ALL, ALL)
    seed: int = 0

    @property
    def layers(self) -> int:
        return len(self.growths)

    @property
    def starts(self) -> list[int]:
        return [self.channels + sum(self.growths[:layer]) for layer in range(self.layers + 1)]

    def reads(self, norm: int) -> int:
        """Channels of a norm, and of the convolution behind it."""
        layer, width = norm // 2, self.widths[norm // 2]
        return (width or self.starts[layer]) if norm % 2 else self.starts[layer] * bool(width)

    @property
    def reduced(self) -> int:
        of_features = [2 * layer + (not width) for layer, width in enumerate(self.widths)]
        readers = [layer for layer, norm in enumerate(of_features) if norm not in self.frozen]
        return 1 + max([*readers, self.layers] if self.tail else readers, default=-1)

    def _parameters(self, make: Case) -> list[Tensor]:
        found: list[Tensor] = []
        for layer, (growth, width) in enumerate(zip(self.growths, self.widths, strict=True)):
            dims, read = len(self.pixels) - 1, self.reads(2 * layer + 1)
            shapes = (width, self.starts[layer], *[1] * dims), (growth, read, *[3] * dims)
            for norm, shape in enumerate(shapes, 2 * layer):
                if not shape[0]:
                    found += [make.vector(0)] * 3
                    continue
                size = 0 if norm in self.plain else shape[1]
                weight = make.weight(*shape)
                if self.wide:
                    weight = weight.float() * 1.003
                if self.channels_last:
                    weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
                found += [make.vector(size).abs() + 0.5, make.vector(size), weight]
        return found

    def _described(self, make: Case) -> dict[str, Any]:
        frozen: list[Tensor] = []
        for norm in range(2 * self.layers if self.frozen else 0):
            size = self.reads(norm) if norm in self.frozen else 0
            frozen += [make.vector(size), make.vector(size).abs() + 0.5]
        return {
            "parameters": self._parameters(make),
            "frozen": frozen,
            "numbers": [1e-5, 1e-3, self.dropout, 0.0] * self.layers,
            "seeds": [7 + layer for layer in range(self.layers)],
            "reduced": self.reduced,
        }

    def _vectors(self, make: Case) -> Tensor:
        channels = sum(self.starts[:-1]) + sum(self.widths) + max(self.widths)
        return make.vector(3 * channels)

    def forward(self) -> dict[str, Any]:
        """Arguments of `dense_block_forward_`; statistics of the input alone are there."""
        make, total = Case(self.dtype, self.seed), self.starts[-1]
        described = self._described(make)
        features = make.rows(self.pixels, total, None if self.recompute else NAN)
        features[..., : self.channels] = make.randn(*self.pixels, self.channels).to(self.dtype)
        statistics = make.vector(2 * (total + sum(self.widths))).abs() + 0.5
        if not self.recompute:
            statistics.fill_(torch.nan)
            of_input = [statistics[at : at + self.channels] for at in (0, total)]
            reference.channel_statistics(features[..., : self.channels], *of_input)
        return {
            "features": features,
            "statistics": statistics,
            "bottlenecks": [make.rows(self.pixels, width, NAN) for width in self.widths],
            "vectors": self._vectors(make),
            **{name: described[name] for name in ("parameters", "frozen", "numbers", "seeds")},
            "reduced": self.reduced,
            "recompute": self.recompute,
            "first": 0,
            "last": 2 * self.layers,
        }

    def _slots(self, parameters: list[Tensor], none: Tensor) -> list[Tensor]:
        """Room for the gradients: sums are wanted with every gradient of data."""
        slots: list[Tensor] = []
        for layer, (norm1, conv1, norm2, conv2) in enumerate(self.needs):
            above, at = self.lowest < layer, self.lowest <= layer
            through = above or ((norm1 or conv1) and self.widths[layer] > 0)
            wanted = (above or norm1, conv1, through or norm2, conv2)
            sizes = (self.reads(2 * layer), 0, self.reads(2 * layer + 1), 0)
            for index, size in enumerate(sizes):
                if index % 2 == 0:
                    slots += [
                        none.new_full((size if at and wanted[index] else 0,), torch.nan)
                        for _ in range(2)
                    ]
                elif at and wanted[index]:
                    weight = parameters[6 * layer + 3 * (index // 2) + 2]
                    slots.append(torch.full(weight.shape, torch.nan).to(weight))
                else:
                    slots.append(none)
        return slots

    def backward(self) -> dict[str, Any]:
        """Arguments of `dense_block_backward_`; the first bottlenecks are not there."""
        make, total = Case(self.dtype, self.seed), self.starts[-1]
        rows = math.prod(self.pixels)
        described = self._described(make)
        made = self.layers - self.held
        return {
            "features": make.rows(self.pixels, total),
            "grad_features": make.rows(self.pixels, total),
            "statistics": make.vector(2 * (total + sum(self.widths))).abs() + 0.5,
            "sums": make.vector(2 * total),
            "bottlenecks": [
                make.rows(self.pixels, width, NAN if layer < made else None)
                for layer, width in enumerate(self.widths)
            ],
            "grad_growth": make.weight(rows * max(self.growths)),
            "grad_norm": make.weight(rows * max(self.widths)),
            "vectors": self._vectors(make),
            "parameters": described["parameters"],
            "frozen": described["frozen"],
            "gradients": self._slots(described["parameters"], make.vector(0)),
            **{name: described[name] for name in ("numbers", "seeds", "reduced")},
            "held": self.held,
            "lowest": self.lowest,
            "first": 2 * max(self.lowest, 0),
            "last": 2 * self.layers,
        }

    def arguments(self, direction: str) -> dict[str, Any]:
        return self.forward() if direction == "forward" else self.backward()


def at_once(operator: Callable[..., None], given: dict[str, Any]) -> None:
    operator(*given.values())


def by_halves(operator: Callable[..., None], given: dict[str, Any]) -> None:
    """One call for each half-layer, as where ranks exchange statistics between them."""
    halves = range(given["first"], given["last"])
    for half in reversed(halves) if "sums" in given else halves:
        operator(*{**given, "first": half, "last": half + 1}.values())


def exchanging(run: Callable[..., None]) -> Callable[..., None]:
    """A backward whose norm2's sums come from elsewhere, as where ranks have exchanged them."""

    def exchanged(operator: Callable[..., None], given: dict[str, Any]) -> None:
        sums, width = given["sums"], max(t.shape[-1] for t in given["bottlenecks"])
        others = torch.linspace(-2, 2, 2 * width).to(sums)
        longer = torch.cat((sums, others))
        run(operator, {**given, "sums": longer})
        sums.copy_(longer[: len(sums)])

    return exchanged


def python_loop(direction: str, operators: Any = operators) -> Callable[..., None]:
    """The definition's loop over the layers, with these operators for a half-layer."""
    loop = getattr(reference_block, f"dense_block_{direction}_")
    return lambda *given: loop(*given, operators=operators)


def compiled(direction: str) -> Callable[..., None]:
    return getattr(operators, f"dense_block_{direction}_")


def outcome(
    case: BlockCase,
    direction: str,
    operator: Callable[..., None],
    run: Callable[..., None] = at_once,
) -> dict[str, Tensor]:
    given = case.arguments(direction)
    run(operator, given)
    return dict(tensors(given))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> None:
    for name, value in expected.items():
        bound = eps * max(value.nan_to_num().abs().flatten().tolist(), default=0.0)
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=0,
            atol=bound,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def check(case: BlockCase, direction: str, *, same_bits: bool = True) -> None:
    """The compiled loop gives the bits of Python's over the same operators, in any ranges.

    And in float64 agrees with the definition. GPUs round a multiplication and an addition once.
    """
    eps = 0.0 if same_bits else 16 * torch.finfo(case.dtype).eps
    ways = [(at_once, by_halves)]
    if direction == "backward":
        ways.append((exchanging(at_once), exchanging(by_halves)))
    for one_call, calls in ways:
        found = outcome(case, direction, compiled(direction), one_call)
        assert_close(found, outcome(case, direction, python_loop(direction), one_call), eps)
        assert_close(outcome(case, direction, compiled(direction), calls), found, 0.0)
    exact = replace(case, dtype=torch.float64, wide=False)
    defined = outcome(exact, direction, python_loop(direction, reference))
    assert_close(outcome(exact, direction, compiled(direction)), defined, 1e-10)


CASES: dict[str, BlockCase] = {
    "usual": BlockCase(),
    "one pixel": BlockCase(pixels=(1, 1, 1), tail=False),
    "frozen": BlockCase(frozen=(0, 3, 4), tail=False),
    "all frozen": BlockCase(frozen=tuple(range(6)), plain=(1, 2), tail=False),
    "no affine": BlockCase(plain=(0, 1, 2, 3, 4, 5)),
    "dropout": BlockCase(dropout=0.4, held=1),
    "recomputed": BlockCase(recompute=True, held=3, channels_last=True),
    "last weight": BlockCase(
        lowest=2, held=1, needs=((False,) * 4, (False,) * 4, (False, False, False, True))
    ),
    "last norm": BlockCase(lowest=2, needs=((False,) * 4, ALL, (False, False, True, False))),
    "some": BlockCase(
        lowest=1, needs=(ALL, (False, True, False, False), (True, False, True, False))
    ),
    "input": BlockCase(needs=((False,) * 4,) * 3),
    "no bottlenecks": BlockCase(widths=(0, 0, 0), held=2),
    "some bottlenecks": BlockCase(widths=(0, 6, 0), frozen=(1, 2), dropout=0.4, tail=False),
    "a bottleneck less": BlockCase(
        widths=(4, 0, 4), lowest=1, needs=(ALL, (False, False, True, True), ALL)
    ),
    "sequences": BlockCase(pixels=(3, 5), held=1),
    "volumes": BlockCase(pixels=(2, 3, 2, 4), held=1),
    "flat volumes": BlockCase(pixels=(2, 1, 3, 4), channels_last=True, dropout=0.4),
}
