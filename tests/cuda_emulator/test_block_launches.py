"""How many kernels the block operators start, and what memory they ask for, counted as they run."""

from __future__ import annotations

from pathlib import Path

import pytest
from dispatched import Run

COUNT = """
import host_build
emulator = host_build.Library({library!r})

def launches(direction, depth, **options):
    of_layers = dict(growths=(3,) * depth, widths=(8,) * depth, needs=(ALL,) * depth)
    case = BlockCase(**{{"pixels": (1, 2, 2), **of_layers, **options}})
    given = case.arguments(direction)
    emulator.reset_counts()
    compiled(direction)(*given.values())
    return emulator.counts.launches
"""
# Of a call: the norms whose statistics are there, and packed weights, 48 in one launch.
DEPTHS = (1, 2, 3, 7, 16)


def counted(run: Run, library: Path, direction: str, options: str = "") -> list[int]:
    code = f"for depth in {DEPTHS}: print(launches({direction!r}, depth, {options}))"
    return [int(n) for n in run(COUNT.format(library=str(library)) + code).split()]


@pytest.mark.parametrize(
    ("direction", "options", "layer"),
    [
        # Product and statistics, with the next norm's coefficients, of both convolutions.
        ("forward", "", 4),
        ("forward", "recompute=True", 2),
        ("forward", "dropout=0.5", 6),
        ("forward", "pixels=(1, 3)", 4),
        ("forward", "pixels=(1, 33, 1, 1)", 4),
        # Product and statistics of one convolution.
        ("forward", "channels=1, growths=(1,) * depth, widths=(0,) * depth", 2),
        # Of few pixels the reduction is split over the kernel's slices; the splits are added.
        ("forward", "pixels=(1, 2, 2, 2)", 5),
        # The bottleneck again, the growth's correction; data gradient, sums and weight gradient of
        # both convolutions; the splits of both.
        ("backward", "", 9),
        ("backward", "held=depth", 8),
        ("backward", "dropout=0.5", 10),
        ("backward", "pixels=(1, 3)", 9),
        ("backward", "pixels=(1, 2, 2, 2)", 9),
        # The growth's correction; data gradient, sums and weight gradient of one convolution; its
        # splits.
        ("backward", "channels=1, growths=(1,) * depth, widths=(0,) * depth", 5),
    ],
)
def test_kernels_of_a_layer(
    run: Run, library: Path, direction: str, options: str, layer: int
) -> None:
    assert counted(run, library, direction, options) == [layer * depth + 2 for depth in DEPTHS]


def test_more_weights_and_norms_than_a_launch_takes(run: Run, library: Path) -> None:
    code = "print(launches('forward', 25), launches('backward', 25), launches('backward', 17))"
    # 50 weights and one norm; 75 weights and 50 norms; 51 weights and 34 norms.
    expected = [4 * 25 + 3, 9 * 25 + 4, 9 * 17 + 3]
    out = run(COUNT.format(library=str(library)) + code)
    assert [int(n) for n in out.split()] == expected


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_memory_is_noticed_before_anything_changes(run: Run, direction: str) -> None:
    """A block whose packed weights need 50 MB at least, of which one number exists."""
    code = f"""
import resource
wide = 1 << 19
case = BlockCase(growths=(1,), widths=(1,), needs=(ALL,), pixels=(1, 1, 1), held=1)
given = case.arguments({direction!r})
with torch.no_grad():
    given["parameters"][2] = torch.empty(1).expand(wide, case.channels, 1, 1)
    given["parameters"][5] = torch.empty(1).expand(1, wide, 3, 3)
    given["parameters"][3:5] = torch.empty(0), torch.empty(0)
    sizes = 2 * (case.starts[-1] + wide), 3 * (case.channels + 2 * wide)
    given["statistics"], given["vectors"] = torch.zeros(sizes[0]), torch.zeros(sizes[1])
    given["bottlenecks"] = [torch.zeros(1, 1, 1, wide)]
    if "gradients" in given:
        given["grad_norm"] = torch.zeros(wide)
        none, sums = torch.empty(0), torch.zeros(wide)
        given["gradients"][2:6] = [none, sums, sums.clone(), none]
written = {{name: value for name, value in given.items() if name != "parameters"}}
before = {{name: tensor.clone() for name, tensor in tensors(written)}}
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, limit[1]))
try:
    getattr(kernel, "dense_block_{direction}_")(*given.values())
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limit)
for name, tensor in tensors(written):
    torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
"""
    assert "CUDA out of memory: no room for a workspace of" in run(code)
