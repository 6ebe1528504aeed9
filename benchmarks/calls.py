"""What the suites time: one training step, and inference, of an implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.memory import autocast, make_batch, training_step
from benchmarks.networks import NetworkSpec
from benchmarks.other_peers import State
from benchmarks.peers import PEERS, build


def make_call(
    part: str,
    spec: NetworkSpec,
    name: str,
    state: State,
    device: torch.device,
    seed: int,
    amp: str = "none",
) -> Callable[[], Tensor]:
    """A step on random images, which returns the loss, or their logits in evaluation mode.

    The part "time" is forward, cross entropy and backward, without an optimizer; "inference" is
    without gradients, by the program that an implementation is deployed to.
    """
    peer = PEERS[name]
    model = build(peer, spec, state, device=device).train(part == "time")
    images, labels = make_batch(spec, peer.layout(spec), device, seed)
    if part == "time":

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            return training_step(model, images, labels, amp)

        return step
    network = model if peer.deploy is None else peer.deploy(model, images)

    def infer() -> Tensor:
        with torch.no_grad(), autocast(device, amp):
            return network(images)

    return infer
