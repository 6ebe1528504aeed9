"""Steps of training and of validation, and what is counted over them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from densenet_fast.train.batches import read_batches
from densenet_fast.train.errors import TrainingError


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


class Meters:
    """Mean loss and accuracies of all processes' images, and what restores them mid-epoch."""

    def __init__(self, classes: int, ranks: Sequence[int], device: torch.device) -> None:
        self._metrics: dict[str, Any] = {"loss": MeanMetric(nan_strategy="disable")}
        for rank in ranks:
            self._metrics[f"top{rank}"] = MulticlassAccuracy(
                classes, top_k=min(rank, classes), average="micro", validate_args=False
            )
        for metric in self._metrics.values():
            metric.to(device)
            metric.persistent(True)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch; `loss` is its mean, `labels` classes [N]."""
        for name, metric in self._metrics.items():
            if name == "loss":
                # Once per image, not with a weight: nan_strategy="disable" forgets weights.
                metric.update(loss.float().expand(len(labels)))
            else:
                metric.update(logits, labels)

    def compute(self) -> dict[str, float]:
        """The loss, and accuracies in percent."""
        with warnings.catch_warnings():  # a resumed epoch may have no step left
            warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)
            found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        return {name: value if name == "loss" else 100 * value for name, value in found.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What has been counted in this process."""
        return {name: dict(metric.state_dict()) for name, metric in self._metrics.items()}

    def restore(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        """Go on from the counts of `state`."""
        for name, metric in self._metrics.items():
            metric.load_state_dict({key: value.to(device) for key, value in state[name].items()})


def hard_labels(labels: Tensor) -> Tensor:
    """Classes [N], of mixed labels [N, classes] the one with the largest share."""
    return labels.argmax(1) if labels.dim() == 2 else labels


class Step:
    """One step of training: forward, backward, clipping, update."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        placement: Placement,
        *,
        label_smoothing: float,
        clip: float | None,
    ) -> None:
        self.network, self.optimizer, self.scaler = network, optimizer, scaler
        self.placement, self.clip = placement, clip
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch before its update, and its logits."""
        # Before the forward: checkpoint="auto" takes gradients that exist for memory that stays.
        self.optimizer.zero_grad(set_to_none=True)
        with self.placement.autocast():
            logits = self.network(images)
            loss: Tensor = self.criterion(logits, labels)
        self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()


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
    classes: int,
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss and accuracies in percent ("loss", "top1", "top5") in evaluation mode.

    The loss is the plain cross entropy, whatever training smooths. Every image counts once,
    however many processes share them.
    """
    meters = Meters(classes, (1, 5), placement.device)
    with _evaluating(model):
        for images, labels in read_batches(loader):
            with placement.autocast():
                logits = model(placement.images(images))
                placed = placement.labels(labels)
                loss = nn.functional.cross_entropy(logits, placed)
            meters.update(loss, logits, placed)
            after_batch()
    return meters.compute()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
