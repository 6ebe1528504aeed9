"""Time of one training step, naive against ours: `pytest benchmarks/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.memory import make_batch, training_step
from benchmarks.networks import densenet_bc
from benchmarks.peers import BASIC_PEERS, PEERS, build, initial_state

CPU = torch.device("cpu")
SEED = 0


@pytest.mark.parametrize("peer", BASIC_PEERS)
@pytest.mark.parametrize("growth_rate", [12, 24, 32])
def test_training_step(benchmark: Any, growth_rate: int, peer: str) -> None:
    """Forward, cross entropy and backward of a DenseNet-BC-22; a group for each growth rate."""
    spec = densenet_bc(22, growth_rate, batch_size=16)
    model = build(PEERS[peer], spec, initial_state(spec, SEED), device=CPU)
    images, labels = make_batch(spec, PEERS[peer].memory_format, CPU, SEED)
    benchmark.group = f"training step, k={growth_rate}"
    benchmark.extra_info["threads"] = torch.get_num_threads()

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return training_step(model, images, labels)

    loss = benchmark.pedantic(step, rounds=10, warmup_rounds=2)
    assert torch.isfinite(loss)
