"""All the well-known DenseNets, in other libraries and compiled, and beside another family.

Measured as the `step` suite does; a network is compared with the peers that can build it.
"""

from __future__ import annotations

from benchmarks import ranking
from benchmarks.networks import KNOWN_NETWORKS, MAIN_NETWORKS
from benchmarks.peers import BASIC_PEERS, PEERS
from benchmarks.report import Page
from benchmarks.suites import Options, Record, step, step_page
from benchmarks.suites.step import failures, run
from benchmarks.suites.step_page import figure

__all__ = ["KNOWN_NETWORKS", "OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = step.OPTIONS
PARTS = step.PARTS

# The compiler takes minutes for each network: unless named, its networks are the main ones.
QUICK_PEERS = (*BASIC_PEERS, "monai", "timm", "resnet50", "resnet101")
FULL_PEERS = tuple(name for name, peer in PEERS.items() if peer.deploy is None)
ROUNDS = 3  # the form says how many networks


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    wanted = options.peers or (FULL_PEERS if options.full else QUICK_PEERS)
    record = step.plan(options, KNOWN_NETWORKS)
    settings = record["settings"]
    settings["peers"] = [name for name in wanted if PEERS[name].installed]
    settings["not_installed"] = [
        PEERS[name].requires for name in wanted if not PEERS[name].installed
    ]
    names = options.networks or (KNOWN_NETWORKS if options.full else MAIN_NETWORKS)
    settings["networks"] = [KNOWN_NETWORKS[name].to_json() for name in names]
    compiled = names if options.peers else MAIN_NETWORKS
    settings["compiled_networks"] = [
        KNOWN_NETWORKS[name].name for name in names if name in compiled
    ]
    settings["rounds"] = options.rounds or ROUNDS
    return record


def page(record: Record) -> Page:
    """The step suite's page, and which libraries were not there."""
    result = step_page.page(record)
    result.title = "DenseNets, other libraries and another family: memory and speed"
    result.add("Of sequences and volumes the naive network is MONAI's.")
    missing = record["settings"]["not_installed"]
    if missing:
        result.add(f"Not compared, as not installed: {', '.join(missing)}.")
    result.heading("Where densenet_fast is not first")
    result.add(ranking.summary([record]))
    return result
