"""Time of a training step and of inference, naive against ours: `pytest benchmarks/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.calls import make_call
from benchmarks.networks import densenet_bc
from benchmarks.peers import BASIC_PEERS, initial_state


@pytest.mark.parametrize("peer", BASIC_PEERS)
@pytest.mark.parametrize("growth_rate", [12, 24, 32])
@pytest.mark.parametrize("part", ["time", "inference"])
def test_network(benchmark: Any, part: str, growth_rate: int, peer: str) -> None:
    """A DenseNet-BC-22 on 16 images; a group for each growth rate."""
    spec = densenet_bc(22, growth_rate, batch_size=16)
    call = make_call(part, spec, peer, initial_state(spec, 0), torch.device("cpu"), 0)
    benchmark.group = f"{part}, k={growth_rate}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    result = benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    assert torch.isfinite(result).all()
