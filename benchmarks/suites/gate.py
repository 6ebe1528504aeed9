"""Three small networks, and what memory they must save: has a change lost any?

Memory is exact, so a ratio below its floor is a failure. Times depend on what else the machine
does: the page lists every place where densenet_fast is not first, and none of them fails.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc
from benchmarks.report import Record, is_naive
from benchmarks.suites import Options
from benchmarks.suites.step import PEAK, Step

SMALL_121 = replace(NETWORKS["densenet121"], batch_size=2)
SMALL_BC = densenet_bc(40, 12, batch_size=16)
ONE_IMAGE = replace(NETWORKS["densenet121"], batch_size=1, image_size=64)
GATED = (SMALL_121, SMALL_BC, ONE_IMAGE)
# Network → implementation → the least that naive's peak may be of ours: about two thirds of what is
# measured. The memory of a network without floors is not measured.
FLOORS: dict[str, dict[str, float]] = {
    SMALL_121.title: {"ours-none": 2.5, "ours-bottleneck": 5.0, "ours-block": 5.0},
    SMALL_BC.title: {"ours-none": 2.5, "ours-bottleneck": 4.0, "ours-block": 4.0},
}


class Gate(Step):
    """Three small networks."""

    title = "Ratios against the naive network, and their floors"
    options = frozenset({"parts", "rounds"})
    rounds = (3, 12)

    def specs(self, options: Options) -> list[NetworkSpec]:
        return list(GATED)

    def peers(self, options: Options) -> tuple[str, ...]:
        return ("naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")

    def parts_of(self, spec: NetworkSpec, peer: str) -> Collection[str]:
        return self.parts if spec.title in FLOORS else ("time", "inference")

    def failures(self, record: Record) -> list[str]:
        found = super().failures(record)
        for table in self.tables(record):
            naive = [row for row in table.rows if is_naive(row)]
            for row in table.rows:
                ratio = PEAK.over(row, naive)
                floor = FLOORS.get(table.title, {}).get(row["peer"], 0)
                if ratio is not None and ratio < floor:
                    found.append(
                        f"memory of {table.title}, {row['peer']}: {ratio:.2f}×, "
                        f"at least {floor}× expected"
                    )
        return found


SUITE = Gate()
