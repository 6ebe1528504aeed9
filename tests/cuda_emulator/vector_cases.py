"""Calls of the kernels on vectors: norms' coefficients, running statistics and sums."""

from __future__ import annotations

import math

import torch
from devices import device
from kernel_calls import Call, Calls, Maker, Pixels
from kernel_cases import avgpool_backward


def norm_coefficients(channels: int, *, affine: bool = True) -> Calls:
    def make(maker: Maker) -> Call:
        affines = maker.vectors(channels, "weight", "bias")
        arguments = {
            "mean": maker.vector(channels),
            "var": maker.vector(channels).abs(),
            **(affines if affine else dict.fromkeys(affines)),
            "eps": 1e-3,
            **maker.results(channels, "scale", "shift", "rstd"),
        }
        return Call(
            "norm_coefficients", maker, arguments, dict.fromkeys(("scale", "shift", "rstd"), 4)
        )

    return make


def update_running_statistics(*channels: int, counters: int = 2, shared: bool = False) -> Calls:
    """Norms of these channels, every third with a total; `shared` buffers belong to all norms."""

    def make(maker: Maker) -> Call:
        places: list[int] = []
        for index, size in enumerate(channels):
            at = sum(2 * c for c in channels[:index])
            places += [at, at + size, 2 * sum(channels) if index % 3 == 2 else -1, size]
        of = channels[:1] * len(channels) if shared else channels
        running = [maker.vector(size).abs() for size in of for _ in "mv"]
        counts = [torch.tensor(n, device=device()) for n in range(counters)]
        arguments = {
            # No mean is a total of few values, and the last element is one.
            "statistics": maker.vector(2 * sum(channels) + 1).abs() + 5,
            "running": running[:2] * len(channels) if shared else running,
            "counters": counts + counts[:1],  # shared by two norms
            "places": places,
            "momenta": [0.3 - 0.2 * (index % 2) for index in range(len(channels))],
            "count": 7,
        }
        lengths = {"running": 4 * (len(channels) if shared else 1), "counters": 1}
        return Call("update_running_statistics_", maker, arguments, lengths)

    return make


def norm_grad_coefficients(channels: int, *, frozen: bool = False) -> Calls:
    def make(maker: Maker) -> Call:
        sums = maker.vectors(channels, "grad_gamma", "grad_beta")
        arguments = {
            **maker.vectors(channels, "scale", "mean", "rstd"),
            **(dict.fromkeys(sums) if frozen else sums),
            "count": 7,
            "coefficients": maker.gradient(3, channels, dtype=maker.statistics),
        }
        return Call("norm_grad_coefficients", maker, arguments, {"coefficients": 8})

    return make


def statistics_and_norm(pixels: Pixels, before: int, channels: int) -> Calls:
    """Of the last `channels` of a norm, that has as many `before` them."""

    def make(maker: Maker) -> Call:
        total = before + channels
        given = maker.results(total, "mean", "var")
        for vector in given.values():
            vector[:before] = maker.vector(before).abs()
        made = maker.results(total, "scale", "shift", "rstd")
        arguments = {
            "features": maker.rows(pixels, channels),
            **given,
            **maker.vectors(total, "weight", "bias"),
            "eps": 1e-3,
            **made,
        }
        rows = math.prod(pixels)
        return Call("statistics_and_norm", maker, arguments, dict.fromkeys((*given, *made), rows))

    return make


def sums_and_backward(pixels: Pixels, channels: int, *, frozen: bool = False) -> Calls:
    def make(maker: Maker) -> Call:
        call = avgpool_backward(pixels, channels)(maker)
        rows = math.prod(pixels)
        call.arguments |= {
            "count": 0 if frozen else rows,
            "coefficients": maker.gradient(3, channels, dtype=maker.statistics),
            **maker.vectors(channels, "sum_grad", "sum_grad_x"),
        }
        lengths = dict.fromkeys(("coefficients", "sum_grad", "sum_grad_x"), rows)
        return Call("sums_and_backward", maker, call.arguments, {**call.lengths, **lengths})

    return make
