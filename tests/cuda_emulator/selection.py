"""A short selection of the tests, for libraries with deliberate faults."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from emulation import DEVICES, SM_80, Emulator
from kernel_calls import KINDS, STORED, Calls, Kind
from kernel_cases import conv3x3_backward, forward
from kernel_checks import check
from test_kernels_conv import check_where_not_finite
from test_kernels_large import CALLS as LARGE
from test_kernels_large import check_far_rows
from test_kernels_orders import OTHERS, PRODUCTS, STEPS
from vector_cases import update_running_statistics

ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


def _products(emulator: Emulator, kind: Kind, calls: dict[str, Calls]) -> Iterator[str]:
    for order, seed in ORDERS:
        emulator.schedule(order, seed)
        for name, make in calls.items():
            yield f"{name}, order {order} {seed}".strip()
            check(emulator.ops, kind, make)


def run(emulator: Emulator, kind: Kind) -> Iterator[str]:
    """Run the checks one by one; their names come before they run."""
    yield from _products(emulator, kind, PRODUCTS)
    if kind in STORED:
        running = update_running_statistics(300, 17, 300, counters=3)
        volumes = {name: make for name, make in OTHERS.items() if "volumes" in name}
        others = {**STEPS, **volumes, "update_running_statistics_": running}
        yield from _products(emulator, kind, others)
    small = DEVICES["64 KB"]
    for name, device in (
        ("conv3x3_backward", small),
        ("conv3x3_backward", replace(small, multiprocessors=1)),  # several tiles in one stage
        ("transition_forward", small),
        ("transition_backward", small),
        ("conv1x1_forward, again", DEVICES["three multiprocessors"]),  # large tiles
    ):
        for order, seed in ORDERS:
            emulator.schedule(order, seed)
            emulator.use(device)
            yield f"{name} on {device}, order {order} {seed}"
            check(emulator.ops, kind, PRODUCTS[name])
            emulator.use(SM_80)
    for layout in ("words", "elements"):
        for make in (
            forward("conv1x1_forward", (1, 3, 5), 13, 11),
            conv3x3_backward((1, 3, 5), 13, 5),
        ):
            yield f"rows of {layout}"
            check(emulator.ops, kind, make, layout=layout)
    yield "NaN"
    check_where_not_finite(emulator, kind, torch.nan)
    for name, make in LARGE.items():
        yield f"{name}, far rows"
        check_far_rows(emulator, kind, make)


def failure(library: str, kind_name: str) -> str:
    """The first failure of the selection with one library; empty without any."""
    torch.set_num_threads(1)
    kind = next(k for k in KINDS if k.name == kind_name)
    name = "loading"
    try:
        for name in run(Emulator(Path(library)), kind):  # noqa: B007
            pass
    except (AssertionError, RuntimeError) as error:
        return f"{name}: {str(error).splitlines()[0] if str(error) else traceback.format_exc()}"
    return ""
