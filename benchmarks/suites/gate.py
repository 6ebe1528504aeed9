"""A few ratios with generous floors: has a change made something much slower or larger?

A report. Memory is exact, so a ratio of memory below its floor is a failure; times depend on what
else the machine does, so a speed below its floor is only said.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc
from benchmarks.report import Column, Record, Row, Table, is_naive, times
from benchmarks.suites import Options
from benchmarks.suites.step import INFERENCE, PEAK, STEP, Step

PEERS = ("naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")
FIGURES = {"memory": PEAK, "time": STEP, "inference": INFERENCE}
SMALL_121 = replace(NETWORKS["densenet121"], batch_size=2)
SMALL_BC = densenet_bc(40, 12, batch_size=16)
ONE_IMAGE = replace(NETWORKS["densenet121"], batch_size=1, image_size=64)
GATED = (SMALL_121, SMALL_BC, ONE_IMAGE)
# Network → part → implementation → the least that naive's figure may be of ours. About two thirds
# of what is measured on processors with AVX2, where the gain in speed is smallest; one image's with
# AVX-512, where the host's share is largest. A network is measured in the parts that have floors.
FLOORS: dict[str, dict[str, dict[str, float]]] = {
    SMALL_121.title: {
        "memory": {"ours-none": 2.5, "ours-bottleneck": 5.0, "ours-block": 5.0},
        "time": {"ours-none": 1.1, "ours-bottleneck": 1.0, "ours-block": 0.8},
        "inference": {"ours-bottleneck": 1.0},
    },
    SMALL_BC.title: {
        "memory": {"ours-none": 2.5, "ours-bottleneck": 4.0, "ours-block": 4.0},
        "time": {"ours-none": 1.2, "ours-bottleneck": 1.1, "ours-block": 0.8},
        "inference": {"ours-bottleneck": 1.0},
    },
    ONE_IMAGE.title: {
        "time": {"ours-none": 0.5, "ours-bottleneck": 0.5, "ours-block": 0.4},
        "inference": {"ours-bottleneck": 0.5},
    },
}


class Gate(Step):
    """Three small networks."""

    title = "Ratios against the naive network, and their floors"
    options = frozenset({"parts", "rounds"})
    rounds = (3, 12)

    def specs(self, options: Options) -> list[NetworkSpec]:
        return list(GATED)

    def peers(self, options: Options) -> tuple[str, ...]:
        return PEERS

    def parts_of(self, spec: NetworkSpec, peer: str) -> Collection[str]:
        return FLOORS[spec.title]

    def plan(self, options: Options) -> Record:
        record = super().plan(options)
        record["settings"]["floors"] = FLOORS
        return record

    def judged(self, record: Record) -> list[Row]:
        """Every ratio that was measured and has a floor."""
        found: list[Row] = []
        for table in super().tables(record):
            for part, floors in record["settings"]["floors"][table.title].items():
                for row in table.rows:
                    naive = [other for other in table.rows if is_naive(other)]
                    ratio = FIGURES[part].over(row, naive)
                    if row["peer"] in floors and ratio is not None:
                        case = {"network": table.title, "part": part, "peer": row["peer"]}
                        found.append({**case, "ratio": ratio, "floor": floors[row["peer"]]})
        return found

    def tables(self, record: Record) -> list[Table]:
        columns = (
            Column("naive / this", lambda row: row["ratio"], times),
            Column("floor", lambda row: row["floor"], times),
            Column("", lambda row: "above" if row["ratio"] >= row["floor"] else "**below**"),
        )
        floors = Table(
            "Floors",
            columns,
            self.judged(record),
            lambda row: f"{row['part']} of {row['network']}",
        )
        return [floors, *super().tables(record)]

    def failures(self, record: Record) -> list[str]:
        below = [
            f"memory of {row['network']}, {row['peer']}: {row['ratio']:.2f}×, "
            f"at least {row['floor']}× expected"
            for row in self.judged(record)
            if row["part"] == "memory" and row["ratio"] < row["floor"]
        ]
        return super().failures(record) + below


SUITE = Gate()
