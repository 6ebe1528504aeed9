"""What the suites `growth` and `depth` share: DenseNet-BCs that differ in one number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.peers import PEERS, build_torchvision
from benchmarks.report import Column, Record, Row, Table, at, billions, millions, percent
from benchmarks.suites import Options
from benchmarks.suites.step import PEAK, SAVED, STEP, Step

IMAGE_SIZES = {1: 4096, 2: 32, 3: 32}  # by dimensions
VOLUMES = 4  # of which a batch has this part of the images
LEAST_POINTS = 4  # of a quadratic fit that says something


class Sweep(Step):
    """One number varies, from end to end; the quick form has fewer values."""

    rounds = (3, 5)

    def __init__(
        self,
        varied: str,
        option: str,
        title: str,
        values: tuple[Sequence[int], Sequence[int]],
        network: Callable[[Options, int], NetworkSpec],
    ) -> None:
        self.varied, self.option, self.title = varied, option, f"{title}: memory and speed"
        self.options = frozenset({option, "dims", "peers", "parts", "rounds"})
        self.forms, self.network = values, network

    def values(self, options: Options) -> Sequence[int]:
        """Those that vary."""
        given: Sequence[int] | None = getattr(options, self.option)
        return given or self.forms[options.full]

    def specs(self, options: Options) -> list[NetworkSpec]:
        return [self.network(options, value) for value in self.values(options)]

    def plan(self, options: Options) -> Record:
        record = super().plan(options)
        specs = self.specs(options)
        names = [n for n in record["settings"]["peers"] if any(PEERS[n].applies(s) for s in specs)]
        record["settings"]["peers"] = names
        record["cases"] = [
            {"value": value, "network": spec.title, "images": spec.batch_size, **counted(spec)}
            for value, spec in zip(self.values(options), specs, strict=True)
        ]
        return record

    def tables(self, record: Record) -> list[Table]:
        values = {case["network"]: f"{self.varied} {case['value']}" for case in record["cases"]}
        columns = (
            Column("images", at("images")),
            Column("parameters, M", at("parameters"), millions),
            Column("GFLOP a step", at("flops"), billions),
        )
        measured = Table("", self.columns, record["rows"], lambda row: values[row["network"]])
        cases = Table("Networks", columns, record["cases"], at("value"), self.varied)
        fits = Table("How it grows", FITS, list(self.fits(record)), at("figure"), "of one image")
        return [measured, *([cases, fits] if measured.shown()[1] else [])]

    def fits(self, record: Record) -> Iterator[Row]:
        """A parabola through each figure of one image, and how much of it is quadratic."""
        cases = {case["network"]: case for case in record["cases"]}
        for title, column, unit in (
            ("peak memory, MiB", PEAK, 2**20),
            ("saved, MiB", SAVED, 2**20),
            ("step, ms", STEP, 1e-3),
        ):
            for peer in record["settings"]["peers"] if self.varied == "depth" else ():
                points = [
                    (cases[row["network"]]["value"], column.of(row) / unit / row["images"])
                    for row in record["rows"]
                    if row["peer"] == peer and column.of(row)
                ]
                if len(points) >= LEAST_POINTS:
                    fit, share = fitted(points)
                    yield {"figure": title, "peer": peer, "fit": fit, "share": share}


FITS = (
    Column("fit for depth d", at("fit")),
    Column("quadratic share at the deepest", at("share"), percent),
)


def fitted(points: list[tuple[float, float]]) -> tuple[str, float]:
    """`a + b·d + c·d²` through points (d, value), and the last term's share at the largest d.

    By least squares of relative errors.
    """
    import numpy as np

    depth, value = (np.array(axis, dtype=float) for axis in zip(*points, strict=True))
    c, b, a = np.polyfit(depth, value, 2, w=1 / value)
    deepest = depth.max()
    share = c * deepest**2 / (a + b * deepest + c * deepest**2)
    return f"{a:.3g} {b:+.3g}·d {c:+.3g}·d²", float(share)


def counted(spec: NetworkSpec) -> dict[str, int]:
    """Parameters, and the FLOPs of the usual network's products in one training step."""
    with torch.device("meta"):
        model = build_torchvision(spec, memory_efficient=False)
        images = torch.empty(spec.input_shape)
        labels = torch.empty(spec.batch_size, dtype=torch.int64)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for part in list(model.modules()):  # norms have no products, and would take most of the time
        for name, child in part.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(part, name, nn.Identity())
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(images), labels).backward()
    return {"parameters": parameters, "flops": counter.get_total_flops()}


def sweep_network(options: Options, depth: int, growth_rate: int, images: int) -> NetworkSpec:
    """The DenseNet-BC of one case, in the dimensions that the user asked for."""
    dims = options.dims or 2
    own = {} if dims == 2 else {"in_channels": 1, "num_classes": 2}
    batch_size = -(-images // VOLUMES) if dims == 3 else images
    size = IMAGE_SIZES[dims]
    return densenet_bc(depth, growth_rate, batch_size=batch_size, image_size=size, dims=dims, **own)
