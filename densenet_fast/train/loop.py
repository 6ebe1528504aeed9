"""Steps of training and of validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast.train.batches import read_batches
from densenet_fast.train.errors import TrainingError
from densenet_fast.train.tasks import Criterion, Figures, Task


class Placement(NamedTuple):
    """Where and how batches are computed."""

    device: torch.device
    memory_format: torch.memory_format
    amp: torch.dtype | None

    def images(self, images: Tensor) -> Tensor:
        """The images on the device, in the layout."""
        return images.to(self.device, non_blocking=True, memory_format=self.memory_format)

    def labels(self, labels: Tensor) -> Tensor:
        """The labels on the device."""
        return labels.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Mixed precision, if there is any."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)


class Step:
    """One step of training: forward, backward, clipping, update.

    Of more images than `batch_size`, so many at a time go through the network; the loss is the mean
    of theirs, by numbers of images.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        placement: Placement,
        *,
        criterion: Criterion,
        batch_size: int,
        clip: float | None,
    ) -> None:
        self.network, self.optimizer, self.scaler = network, optimizer, scaler
        self.placement, self.clip = placement, clip
        self.criterion, self.batch_size = criterion, batch_size
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the images before the update, and their logits."""
        # Before the forward: checkpoint="auto" takes gradients that exist for memory that stays.
        self.optimizer.zero_grad(set_to_none=True)
        losses, outputs = [], []
        parts = list(zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True))
        for number, (some, theirs) in enumerate(parts, 1):
            with self._exchanging(number == len(parts)):
                with self.placement.autocast():
                    logits = self.network(self.placement.images(some))
                    loss: Tensor = self.criterion(logits, self.placement.labels(theirs))
                if len(parts) > 1:
                    loss = loss * (len(some) / len(images))
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
            outputs.append(logits.detach())
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack(losses).sum(), torch.cat(outputs)

    def _exchanging(self, last: bool) -> Any:
        """Processes add their gradients in the last part of a step alone."""
        apart = None if last else getattr(self.network, "no_sync", None)
        return nullcontext() if apart is None else apart()


def check_finite(loss: float, where: str) -> None:
    """Refuse to go on with numbers that cannot recover.

    Raises:
        TrainingError: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} {where}: try a lower --lr, --lr-warmup-epochs or "
            "--clip-grad-norm; the checkpoints are of before"
        )


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: Any,
    placement: Placement,
    task: Task,
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> Figures:
    """The task's figures in evaluation mode.

    The loss is the plain one, whatever training smooths or weights. Every image counts once,
    however many processes share them.
    """
    meters, criterion = task.meters(placement.device, training=False), task.criterion()
    with _evaluating(model):
        for images, labels in read_batches(loader):
            with placement.autocast():
                logits = model(placement.images(images))
                placed = placement.labels(labels)
                loss = criterion(logits, placed)
            meters.update(loss, logits, placed)
            after_batch()
    return task.figures(meters.compute())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
