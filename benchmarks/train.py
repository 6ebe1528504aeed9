"""Training of several implementations side by side, as the suites do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.datasets import Images, batches
from benchmarks.measure import timed, tuned_libraries
from benchmarks.memory import training_step
from benchmarks.networks import NetworkSpec
from benchmarks.other_peers import State
from benchmarks.peers import PEERS, build, initial_state
from benchmarks.report import Row
from benchmarks.suites import Advance, Task, case_of

LEARNING_RATE = 0.01


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


def trained(row: Row, part: str = "training") -> bool:
    """Whether `train` has finished a row."""
    return "test_loss" in row.get(part, ())


def training_task(
    rows: Sequence[Row],
    part: str,
    spec: NetworkSpec,
    images: Callable[[], Images],
    device: torch.device,
    *,
    steps: int,
    seed: int,
    weight: float,
    **how: Any,
) -> Task:
    """To train the rows' peers side by side; `weight` of each step on the progress bar."""

    def call(advance: Advance) -> None:
        done: Callable[[Row], None] = lambda row: advance(weight)  # noqa: E731
        train(rows, part, spec, images(), device, steps=steps, seed=seed, advance=done, **how)

    done = all(trained(row, part) for row in rows)
    return Task(f"{part}: {case_of(rows[0])}", weight * steps * len(rows), done, call)


def train(
    rows: Sequence[Row],
    part: str,
    spec: NetworkSpec,
    images: Images,
    device: torch.device,
    *,
    steps: int,
    seed: int,
    advance: Callable[[Row], None],
    dtype: torch.dtype = torch.float32,
    test_images: int | None = None,
    state: State | None = None,
    recipe: Recipe = FROM_SCRATCH,
) -> list[nn.Module]:
    """Train the rows' peers, step by step in turn, and test them at the end.

    All start from the same weights, those of `state` or new ones, and see the same batches. Each
    one's figures go into that part of its row step by step; `advance` is called with the row after
    each of its steps. Returns the trained networks.
    """
    if state is None:
        state = initial_state(spec, seed)
    trainees = [_Trainee(row, spec, state, steps, device, dtype, recipe) for row in rows]
    for row, trainee in zip(rows, trainees, strict=True):
        row[part] = trainee.figures
    with tuned_libraries(device):
        for batch, labels in batches(images, spec.batch_size, steps, seed):
            for row, trainee in zip(rows, trainees, strict=True):
                trainee.step(batch, labels)
                advance(row)
        for trainee in trainees:
            trainee.test(images, test_images)
    return [trainee.model for trainee in trainees]


class _Trainee:
    """One implementation in training; its figures fill step by step."""

    def __init__(
        self,
        row: Row,
        spec: NetworkSpec,
        state: State,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        recipe: Recipe,
    ) -> None:
        self.peer, self.spec, self.device, self.dtype = PEERS[row["peer"]], spec, device, dtype
        self.model = build(self.peer, spec, state, device=device, dtype=dtype)
        self.optimizer = recipe.optimizer(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.share(step, steps)
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        self.figures: dict[str, Any] = {"parameters": parameters, "losses": [], "seconds": []}

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
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        call = lambda: losses.append(training_step(self.model, images, labels).detach())  # noqa: E731
        self.figures["seconds"].append(timed(call, self.device))
        self.optimizer.step()
        self.schedule.step()
        self.figures["losses"].append(losses[0].item())

    @torch.no_grad()
    def test(self, images: Images, count: int | None, batch_size: int = 60) -> None:
        """Mean loss and accuracy on the first `count` test images, in evaluation mode."""
        self.model.eval()
        labels = images.test_labels[:count]
        parts = images.test_images[:count].split(batch_size)
        logits = torch.cat([self.model(self._to_device(part)).cpu() for part in parts])
        right = logits.argmax(dim=1) == labels
        self.figures["test_images"] = len(labels)
        self.figures["test_accuracy"] = right.double().mean().item()
        self.figures["test_loss"] = nn.functional.cross_entropy(logits, labels).item()
