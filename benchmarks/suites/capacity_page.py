"""The page and the plot of the `capacity` suite, made from its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.peers import PEERS
from benchmarks.plots import peer_bars
from benchmarks.report import MISSING, Page, Table, intro, mebibytes, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

Entries = dict[str, dict[str, Any]]

# Part → what a size counts.
UNITS = {"batch": "images", "depth": "layers"}
METHOD = (
    "What a step takes: parameters, their gradients, the images, and the step's peak beyond those "
    "(activations and scratch), as much as a device must have. Running statistics and labels, "
    "below 1 % of it, are not counted, and neither is what an optimizer or the process itself "
    "needs. A step is forward, cross entropy and backward in float32.",
    "Every size in the tables was measured, in a child process of its own, after one whole warm-up "
    "step, with the parameters' gradients allocated; the `step` suite's page says how. *Largest* "
    "was measured to fit the budget, and *next* was measured not to: the next batch, from 200 "
    "images on at most 1 % more, or the next depth of 6·n + 4 layers. A prediction from the "
    "networks' shapes only says where to measure first. Ratios are against the naive network, in "
    "its better layout.",
)
CLAIM = (
    "Published (Pleiss et al. 2017, arXiv 1707.06990): recomputing what concatenation and "
    "normalisation made takes the networks that train on one GPU from 4 to 14 million parameters, "
    "3.50×, and brings 264 layers on ImageNet within reach."
)


def entries_of(record: Record, search: dict[str, Any], budget: int) -> Entries:
    """What was found for one network and one budget, by peer."""
    return {
        entry["peer"]: entry
        for entry in record[search["part"]]
        if (entry["title"], entry["budget"]) == (search["title"], budget)
    }


def found_of(entries: Entries, key: str) -> dict[str, int]:
    """A figure of the largest size that fits, by peer, where the search came to its end."""
    return {
        name: entry["fits"][key]
        for name, entry in entries.items()
        if entry["fits"] and not _open(entry)
    }


def _open(entry: dict[str, Any]) -> bool:
    """Whether the search stopped before its end."""
    return "error" in entry or "machine_too_small" in entry


def best(values: dict[str, int], *, ours: bool) -> int | None:
    """The largest figure of the naive network in any layout, or of densenet_fast in any mode."""
    return max(
        (v for name, v in values.items() if (PEERS[name].ours if ours else PEERS[name].naive)),
        default=None,
    )


def page(record: Record) -> Page:
    """A table for each network and each budget."""
    result = Page("What fits a given memory: the largest batch and the deepest network")
    settings = record["settings"]
    result.add(*intro(record), *METHOD)
    for search in settings["searches"]:
        result.heading(search["title"])
        if search["part"] == "depth":
            result.add(CLAIM)
        for budget in settings["budgets"]:
            entries = entries_of(record, search, budget)
            if entries:
                result.add(_table(entries, search["part"], budget))
                result.add(*_remarks(entries, search["part"], budget))
    return result


def _table(entries: Entries, part: str, budget: int) -> Table:
    unit = UNITS[part]
    columns = [f"{budget:,} MiB", f"largest, {unit}", "this / naive"]
    if part == "depth":
        columns += ["parameters, millions", "this / naive"]
    table = Table([*columns, "takes, MiB", f"next, {unit}", "takes, MiB"])
    sizes, weights = (found_of(entries, key) for key in ("value", "parameters"))
    for name, entry in entries.items():
        row = [
            PEERS[name].label,
            _largest(entry),
            ratio(sizes.get(name), best(sizes, ours=False)),
        ]
        if part == "depth":
            millions = f"{weights[name] / 1e6:.2f}" if name in weights else MISSING
            row += [millions, ratio(weights.get(name), best(weights, ours=False))]
        fits, larger = entry["fits"], entry["next"]
        row.append(mebibytes(fits["bytes"]) if fits else MISSING)
        row.append(f"{larger['value']:,}" if larger else MISSING)
        row.append(_bytes_of_next(larger))
        table.rows.append(row)
    return table


def _largest(entry: dict[str, Any]) -> str:
    least = f"{entry['fits']['value']:,}" if entry["fits"] else ""
    if _open(entry):
        return f"at least {least}" if least else MISSING
    return least or "does not fit"


def _bytes_of_next(larger: dict[str, Any] | None) -> str:
    if larger is None:
        return MISSING
    return "out of memory" if larger["bytes"] is None else mebibytes(larger["bytes"])


def _remarks(entries: Entries, part: str, budget: int) -> list[str]:
    """What the table has no room for."""
    lines = []
    for name, entry in entries.items():
        if "machine_too_small" in entry:
            lines.append(f"- {name}: needs more memory than this machine has.")
        elif "error" in entry:
            lines.append(f"- {name}: not measured: {entry['error']}")
        elif not entry["fits"]:
            least = entry["next"]
            more = "more than there is"
            if least["bytes"] is not None:
                more = f"{mebibytes(least['bytes'] - budget * 2**20)} MiB more than the budget"
            size = "one image" if part == "batch" else f"{least['value']} layers"
            lines.append(f"- {name}: does not fit: a step with {size} takes {more}.")
    remarks = ["\n".join(lines)] if lines else []
    weights = found_of(entries, "parameters")
    naive, ours = best(weights, ours=False), best(weights, ours=True)
    if part == "depth" and naive and ours:
        remarks.append(
            f"In {budget:,} MiB the naive network has up to {naive / 1e6:.2f} million parameters, "
            f"and densenet_fast {ours / 1e6:.2f}: {ratio(ours, naive)}."
        )
    return remarks


def figure(record: Record) -> Figure | None:
    """Bars of the largest sizes: a row for each budget, a column for each network."""
    settings = record["settings"]
    searches, budgets = settings["searches"], settings["budgets"]
    grid = [[entries_of(record, search, budget) for search in searches] for budget in budgets]
    if not any(found_of(entries, "value") for row in grid for entries in row):
        return None
    from matplotlib.figure import Figure

    size = (1.5 + 4.5 * len(searches), 0.5 + 2.5 * len(budgets))
    plot = Figure(figsize=size, layout="constrained")
    panels = plot.subplots(len(budgets), len(searches), squeeze=False)
    for budget, row, axes_row in zip(budgets, grid, panels, strict=True):
        for search, entries, axes in zip(searches, row, axes_row, strict=True):
            # No bar says that nothing fits, so what is not known has no place in the panel.
            known = [name for name, entry in entries.items() if not _open(entry)]
            values, text = found_of(entries, "value"), UNITS[search["part"]]
            peer_bars(axes, known, values, text, named=True)
            axes.set_title(f"{search['title']}\nin {budget:,} MiB", fontsize="small", loc="left")
    return plot
