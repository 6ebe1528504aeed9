"""The page of a first run on a GPU: what failed, and what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

Entries = Mapping[str, Mapping[str, Any]]
SHOWN = 40  # kernels


def failed(entries: Entries) -> dict[str, str]:
    """Cases with an error or without an end, and why."""
    why = {
        name: "not finished" if e.get("begun") else e.get("error") for name, e in entries.items()
    }
    return {name: reason for name, reason in why.items() if reason}


def page(parts: Mapping[str, Entries]) -> str:
    """Markdown of all parts, by their titles."""
    first = next(iter(parts.values()))
    text = ["# A first run on a GPU", *_environment(first.get("environment", {}))]
    for title, entries in parts.items():
        cases = {name: entry for name, entry in entries.items() if name != "environment"}
        bad = failed(cases)
        text.append(f"## {title}")
        text.append(f"{len(cases)} cases, {len(bad)} failed." if cases else "Not run.")
        text += [f"- {name}: `{_line(reason)}`" for name, reason in bad.items()]
        measured = [entry for name, entry in cases.items() if name not in bad]
        for table in (_accuracy, _steps, _kernels, _host):
            text += table(measured)
    return "\n\n".join(text) + "\n"


def _environment(found: Mapping[str, Any]) -> list[str]:
    own, versions = found.get("densenet_fast", {}), found.get("versions", {})
    missing = "none: the project's own naive network stands for it, tests/cuda/naive_torchvision.py"
    rows = {
        "device": found.get("device_name") or found.get("device"),
        "torch": versions.get("torch"),
        "torchvision": missing if found.get("stands_in") else versions.get("torchvision"),
        "CUDA kernels for": own.get("cuda_architectures"),
        "chosen": own.get("cuda_architectures_reason"),
        "CUDA kernels run": own.get("cuda") or own.get("cuda_reason"),
        "commit": found.get("commit"),
        "date": found.get("date"),
    }
    return [_table(("", ""), rows.items())] if found else []


def _accuracy(entries: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        (e["case"], f"{e['torchvision']:.3g}", f"{e['ours']:.3g}")
        for e in entries
        if "torchvision" in e
    ]
    return _titled("Errors against float64", ("case", "torchvision", "ours"), rows)


def _steps(entries: list[Mapping[str, Any]]) -> list[str]:
    rows = []
    for e in (e for e in entries if "precision" in e):
        graph = e.get("graph_seconds")
        rows.append(
            (
                *(e[key] for key in ("network", "precision", "peer")),
                f"{e['peak'] / 2**20:,.0f}",
                _milliseconds(e["seconds"]),
                _milliseconds(graph) if graph else _line(e.get("graph_error", "–")),
                f"{e['graph_pool'] / 2**20:,.0f}" if graph else "–",
            )
        )
    columns = ("network", "precision", "implementation", "peak, MiB", "step, ms", "graph, ms")
    return _titled("Median (minimum) of a step", (*columns, "graph's pool, MiB"), rows)


def _milliseconds(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g} ({min(seconds) * 1e3:.3g})"


def _kernels(entries: list[Mapping[str, Any]]) -> list[str]:
    device = next((e for e in entries if "bandwidth" in e), None)
    if device is None:
        return []
    bandwidth, rates = device["bandwidth"], device["rates"]
    rows = []
    for e in (e for e in entries if "kernel" in e):
        busy = sum(kernel[2] for kernel in e["kernels"])
        least = max(e["moved"] / bandwidth, e["flops"] / rates[e["type"]])
        lost = (busy - least) * e["times"]
        names = "; ".join(f"{k[0]} {k[2] * 1e6:.0f}" for k in e["kernels"][:5])
        rows.append(
            (
                lost,
                f"{e['kernel']}, {e['shape']}, {e['type']}",
                *(f"{x * 1e6:.0f}" for x in (busy, e["seconds"], least)),
                f"{e['moved'] / busy / 1e9:.3g} ({e['moved'] / busy / bandwidth:.0%})",
                f"{e['flops'] / busy / 1e12:.3g} ({e['flops'] / busy / rates[e['type']]:.0%})",
                f"{lost * 1e3:.2f}",
                names,
            )
        )
    rows.sort(key=lambda row: -row[0])
    rate = ", ".join(f"{label} {value / 1e12:.3g} TFLOP/s" for label, value in rates.items())
    columns = ("operator", "kernels, µs", "call, µs", "roofline, µs", "GB/s", "TFLOP/s")
    return [
        f"This device's copy: {bandwidth / 1e9:.4g} GB/s; product: {rate}. Lost: time beyond the "
        "roofline of these two, for all layers of the block.",
        _table((*columns, "lost, ms a step", "its kernels, µs"), (r[1:] for r in rows[:SHOWN])),
    ]


def _host(entries: list[Mapping[str, Any]]) -> list[str]:
    text = []
    for e in (e for e in entries if "device_seconds" in e):
        busy = e["device_seconds"] / e["seconds"]
        text.append(
            f"**{e['case']}**, bfloat16: a step takes {e['seconds'] * 1e3:.2f} ms, in which the "
            f"device works {e['device_seconds'] * 1e3:.2f} ms ({busy:.0%}) on {e['kernels']} "
            f"kernels. {'The host is in front.' if busy < 0.9 else 'The device is in front.'}"
        )
        rows = [(k[0], k[1], f"{k[2] * 1e3:.2f}") for k in e["longest_operations"]]
        text.append(_table(("host operation", "calls", "own ms, under the profiler"), rows))
    return text


def _line(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "/")[:300]


def _titled(title: str, columns: Iterable[str], rows: list[Any]) -> list[str]:
    return [f"{title}:", _table(columns, rows)] if rows else []


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_line(str(cell)) for cell in line) + " |" for line in lines)
