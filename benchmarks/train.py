"""Training of several implementations side by side, as the suites do it.

AdamW with a linear warm-up over the first tenth of the steps and a linear decay to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import Images, batches
from benchmarks.measure import timed, tuned_libraries
from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS, build, initial_state

LEARNING_RATE = 0.01

Entry = dict[str, Any]


def new_entry(**named: Any) -> Entry:
    """An entry of a record for what `train` measures."""
    return {**named, "losses": [], "seconds": []}


def tested(entry: Entry) -> bool:
    """Whether `train` has finished an entry."""
    return "test_loss" in entry


def train(
    entries: Mapping[str, Entry],
    spec: NetworkSpec,
    images: Images,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    advance: Callable[[str], None],
    dtype: torch.dtype = torch.float32,
    test_images: int | None = None,
) -> None:
    """Train the peers named by `entries`, step by step in turn, and test them at the end.

    All start from the same weights and see the same batches. Each one's figures go into its entry
    step by step; `advance` is called with its name after each of its steps.
    """
    state = initial_state(spec, seed)
    trainees = {
        name: _Trainee(name, spec, state, entry, steps, device, dtype)
        for name, entry in entries.items()
    }
    with tuned_libraries(device):
        for batch, labels in batches(images, spec.batch_size, steps, seed):
            for name, trainee in trainees.items():
                trainee.step(batch, labels)
                advance(name)
        for trainee in trainees.values():
            trainee.test(images, test_images)


class _Trainee:
    """One implementation in training; its figures go into `entry` step by step."""

    def __init__(
        self,
        name: str,
        spec: NetworkSpec,
        state: dict[str, Tensor],
        entry: Entry,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.peer = PEERS[name]
        self.model = build(self.peer, spec, state, device=device, dtype=dtype)
        self.entry = entry
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        warmup = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
        )
        entry["parameters"] = sum(p.numel() for p in self.model.parameters())

    def _to_device(self, images: Tensor) -> Tensor:
        placed = images.to(device=self.device, dtype=self.dtype)
        return placed.contiguous(memory_format=self.peer.memory_format)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step; forward, loss and backward are timed, the optimizer is not."""
        images, labels = self._to_device(images), labels.to(self.device)
        losses = []
        self.optimizer.zero_grad(set_to_none=True)

        def forward_backward() -> None:
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            losses.append(loss.detach())

        self.entry["seconds"].append(timed(forward_backward, self.device))
        self.optimizer.step()
        self.schedule.step()
        self.entry["losses"].append(losses[0].item())

    @torch.no_grad()
    def test(self, images: Images, count: int | None, batch_size: int = 60) -> None:
        """Mean loss and accuracy on the first `count` test images, in evaluation mode."""
        self.model.eval()
        right, loss = 0, 0.0
        all_labels = images.test_labels[:count]
        for batch, labels in zip(
            images.test_images[:count].split(batch_size), all_labels.split(batch_size), strict=True
        ):
            logits = self.model(self._to_device(batch)).cpu()
            right += int((logits.argmax(dim=1) == labels).sum())
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        self.entry["test_accuracy"] = right / len(all_labels)
        self.entry["test_loss"] = loss / len(all_labels)
