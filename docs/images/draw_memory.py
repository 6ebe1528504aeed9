"""Draws `memory.svg`, from `densenet_fast.memory.estimate`: `python docs/images/draw_memory.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from densenet_fast import densenet121
from densenet_fast.memory import MemoryEstimate, estimate

PICTURE = Path(__file__).resolve().with_name("memory.svg")
MODES = ("none", "bottleneck", "block")
INK, LINE, KEPT, SCRATCH = "#1f2933", "#607d8b", "#90c4de", "#fbcb9b"
WIDTH, HEIGHT = 760, 320
BASE, SCALE = 262, 0.86  # the zero line; pixels per MiB
BAR, GAP, PANEL = 34, 8, 248


def estimates() -> dict[str, MemoryEstimate]:
    """DenseNet-121, 8×3×224², float32, gradients allocated, by checkpoint mode."""
    model = densenet121()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return {mode: estimate(model, (8, 3, 224, 224), checkpoint=mode) for mode in MODES}


def text(x: float, y: float, words: str, style: str = "") -> str:
    """One line of text; y is its baseline."""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{words}</text>'


def box(x: float, top: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle."""
    place = f'x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{fill}" stroke="white"/>'


def line(x1: float, x2: float, y: float, style: str = "") -> str:
    """A horizontal line."""
    place = f'x1="{x1:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y:.1f}"'
    return f'<line {place} stroke="{LINE}"{style}/>'


def panel(left: float, mode: str, whole: MemoryEstimate) -> list[str]:
    """One mode: a bar per part, what is kept below what its backward needs."""
    mib = 2**20
    sizes = f"kept {whole.kept / mib:.0f}, peak {whole.peak / mib:.0f} MiB"
    parts = whole.parts[:-1]  # without the classifier
    right = left + len(parts) * (BAR + GAP) - GAP
    drawn = [text(left, 24, f"checkpoint=&quot;{mode}&quot;", ' font-weight="bold"')]
    drawn.append(text(left, 42, sizes))
    for at, part in enumerate(parts):
        x = left + at * (BAR + GAP)
        kept, scratch = (part.peak - part.scratch) / mib * SCALE, part.scratch / mib * SCALE
        drawn.append(box(x, BASE - kept, BAR, kept, KEPT))
        drawn.append(box(x, BASE - kept - scratch, BAR, scratch, SCRATCH))
        name = part.name.removeprefix("dense")
        drawn.append(text(x + BAR / 2, BASE + 16, name, ' text-anchor="middle" font-size="11"'))
    drawn.append(line(left, right, BASE))
    drawn.append(line(left, right, BASE - whole.peak / mib * SCALE, ' stroke-dasharray="4 3"'))
    drawn.append(line(right, left, BASE + 24, ' marker-end="url(#head)"'))
    return drawn


def picture() -> str:
    """The SVG: three modes side by side."""
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="sans-serif" font-size="12" '
        f'fill="{INK}">',
        "<title>Memory in the backward of each part, by checkpoint mode</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for at, (mode, whole) in enumerate(estimates().items()):
        drawn += panel(20 + at * PANEL, mode, whole)
    y = BASE + 44
    drawn.append(text(20, y, "The arrows show the order of the backward."))
    for x, fill, words in (
        (300, KEPT, "kept, up to this part"),
        (530, SCRATCH, "needed by its backward"),
    ):
        drawn += [box(x, y - 10, 12, 12, fill), text(x + 17, y, words)]
    return "\n".join([*drawn, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
