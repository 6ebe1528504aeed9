"""Time of inference, naive against ours: `pytest benchmarks/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.memory import make_batch
from benchmarks.networks import densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS, build, initial_state

CPU = torch.device("cpu")
SEED = 0


@pytest.mark.parametrize("peer", BASIC_PEERS)
@pytest.mark.parametrize("growth_rate", [12, 24, 32])
def test_inference(benchmark: Any, growth_rate: int, peer: str) -> None:
    """A DenseNet-BC-22 in evaluation mode without gradients; a group for each growth rate."""
    spec = densenet_bc(22, growth_rate, batch_size=16)
    model = build(PEERS[peer], spec, initial_state(spec, SEED), device=CPU).eval()
    images, _ = make_batch(spec, PEERS[peer].layout(spec), CPU, SEED)
    benchmark.group = f"inference, k={growth_rate}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    with torch.no_grad():
        scores = benchmark.pedantic(lambda: model(images), rounds=10, warmup_rounds=2)
    assert torch.isfinite(scores).all()
