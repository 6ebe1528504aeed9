"""All the well-known DenseNets, in other libraries and compiled, and beside another family."""

from __future__ import annotations

from benchmarks.networks import KNOWN_NETWORKS, MAIN_NETWORKS, NetworkSpec
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.report import Record
from benchmarks.suites import Options
from benchmarks.suites.step import Step

# The compiler takes minutes for each network: unless named, its networks are the main ones.
QUICK_PEERS = (*BASIC_PEERS, "monai", "timm", "resnet50", "resnet101")
FULL_PEERS = tuple(name for name, peer in PEERS.items() if peer.deploy is None)


class Networks(Step):
    """A network is compared with the peers that can build it."""

    title = "DenseNets, other libraries and another family: memory and speed"
    known_networks = KNOWN_NETWORKS
    rounds = (3, 3)  # the form says how many networks

    def specs(self, options: Options) -> list[NetworkSpec]:
        names = options.networks or (KNOWN_NETWORKS if options.full else MAIN_NETWORKS)
        return [KNOWN_NETWORKS[name] for name in names]

    def peers(self, options: Options) -> tuple[str, ...]:
        return FULL_PEERS if options.full else QUICK_PEERS

    def plan(self, options: Options) -> Record:
        record = super().plan(options)
        if not options.peers:
            compiled = {KNOWN_NETWORKS[name].title for name in MAIN_NETWORKS}
            record["rows"] = [
                row
                for row in record["rows"]
                if row["network"] in compiled or not PEERS[row["peer"]].compiled
            ]
        return record


SUITE = Networks()
