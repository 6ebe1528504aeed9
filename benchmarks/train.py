"""Training of several implementations side by side, as the suites do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import Images, batches
from benchmarks.measure import timed, tuned_libraries
from benchmarks.networks import NetworkSpec
from benchmarks.other_peers import State
from benchmarks.peers import PEERS, build, initial_state

LEARNING_RATE = 0.01

Entry = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """An optimizer, and the share of its learning rate at a step of so many."""

    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    share: Callable[[int, int], float]


def _warm_up_and_decay(step: int, steps: int) -> float:
    """Linear over the first tenth of the steps, then linear to zero."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)


FROM_SCRATCH = Recipe(lambda p: torch.optim.AdamW(p, LEARNING_RATE), _warm_up_and_decay)
# PyTorch's tutorial on transfer learning: SGD with momentum, a tenth of the rate in the last third.
FINE_TUNING = Recipe(
    lambda p: torch.optim.SGD(p, LEARNING_RATE, momentum=0.9),
    lambda step, steps: 1.0 if 3 * step < 2 * steps else 0.1,
)


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
    state: State | None = None,
    recipe: Recipe = FROM_SCRATCH,
) -> dict[str, nn.Module]:
    """Train the peers named by `entries`, step by step in turn, and test them at the end.

    All start from the same weights, those of `state` or new ones, and see the same batches. Each
    one's figures go into its entry step by step; `advance` is called with its name after each of
    its steps. Returns the trained networks.
    """
    if state is None:
        state = initial_state(spec, seed)
    trainees = {
        name: _Trainee(name, spec, state, entry, steps, device, dtype, recipe)
        for name, entry in entries.items()
    }
    with tuned_libraries(device):
        for batch, labels in batches(images, spec.batch_size, steps, seed):
            for name, trainee in trainees.items():
                trainee.step(batch, labels)
                advance(name)
        for trainee in trainees.values():
            trainee.test(images, test_images)
    return {name: trainee.model for name, trainee in trainees.items()}


class _Trainee:
    """One implementation in training; its figures go into `entry` step by step."""

    def __init__(
        self,
        name: str,
        spec: NetworkSpec,
        state: State,
        entry: Entry,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        recipe: Recipe,
    ) -> None:
        self.peer, self.spec = PEERS[name], spec
        self.model = build(self.peer, spec, state, device=device, dtype=dtype)
        self.entry = entry
        self.device, self.dtype = device, dtype
        self.optimizer = recipe.optimizer(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.share(step, steps)
        )
        entry["parameters"] = sum(p.numel() for p in self.model.parameters())

    def _to_device(self, images: Tensor) -> Tensor:
        placed = images.to(device=self.device, dtype=self.dtype)
        if placed.shape[2] != self.spec.image_size:
            size = (self.spec.image_size,) * 2
            placed = nn.functional.interpolate(placed, size, mode="bilinear", antialias=True)
        placed = placed.expand(-1, self.spec.in_channels, -1, -1)
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
