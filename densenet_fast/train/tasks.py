"""What a network is asked: which class an image is of, or of several labels which ones apply."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from densenet_fast.train.entries import MULTICLASS, MULTILABEL

Criterion = Any  # a function of logits and labels


class Figures(NamedTuple):
    """What is found over images: figures of all, and those of each class, in order.

    nan where one is not defined, such as the precision of a class that is never said.
    """

    whole: dict[str, float]
    by_class: list[dict[str, float]]


class Meters:
    """What is counted over all processes' images, and what restores it mid-epoch."""

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._metrics: dict[str, Any] = {"loss": MeanMetric(nan_strategy="disable"), **metrics}
        for metric in self._metrics.values():
            metric.to(device)
            metric.persistent(True)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch; `loss` is its mean."""
        for name, metric in self._metrics.items():
            if name == "loss":
                # Once per image, not with a weight: nan_strategy="disable" forgets weights.
                metric.update(loss.float().expand(len(labels)))
            else:
                metric.update(logits, labels)

    def compute(self) -> dict[str, Any]:
        """What each metric has found."""
        with warnings.catch_warnings():  # a resumed epoch may have no step left
            warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)
            return {name: metric.compute() for name, metric in self._metrics.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What has been counted in this process."""
        return {name: dict(metric.state_dict()) for name, metric in self._metrics.items()}

    def restore(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        """Go on from the counts of `state`."""
        for name, metric in self._metrics.items():
            metric.load_state_dict({key: value.to(device) for key, value in state[name].items()})


class Task(ABC):
    """What logits [N, classes] mean, how far they are from labels, and how good that is."""

    name: ClassVar[str]
    best: ClassVar[str]  # the figure by which weights are the best

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class [N, classes]."""

    @abstractmethod
    def balance(self, labels: Tensor) -> Tensor:
        """Weights [classes] that make up for rare classes among the labels of training."""

    @abstractmethod
    def criterion(self, weights: Tensor | None = None, smoothing: float = 0.0) -> Criterion:
        """The loss; without arguments, that of validation."""

    @abstractmethod
    def meters(self, device: torch.device, *, training: bool) -> Meters:
        """What is counted in an epoch of training, or in validation."""

    @abstractmethod
    def figures(self, found: Mapping[str, Any]) -> Figures:
        """What `Meters.compute` has found."""

    def of_batch(self, logits: Tensor, labels: Tensor) -> str:
        """How a batch of training went, beyond its loss, in words; "" for nothing."""
        return ""

    @abstractmethod
    def describe(self, figures: Mapping[str, float], prefix: str = "") -> str:
        """Figures of all images, whose names begin with `prefix`, in words."""


class _Counts(Metric):
    """Of each class: how many images are of it, how many are said to be, and how many are both."""

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("counts", torch.zeros(3, classes, dtype=torch.int64), "sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        said = logits.argmax(1)
        parts = (labels, said, labels[labels == said])
        self.counts += torch.stack([torch.bincount(p, minlength=self.classes) for p in parts])

    def compute(self) -> Tensor:
        return self.counts


class Multiclass(Task):
    """Every image is of one class: softmax and cross entropy. Labels are classes [N].

    Figures of a class are its images, recall (the accuracy over them) and precision in percent.
    """

    name, best = MULTICLASS, "top1"

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def balance(self, labels: Tensor) -> Tensor:
        """Of a class with n of N images: N / (classes · n)."""
        return len(labels) / (self.classes * torch.bincount(labels, minlength=self.classes))

    def criterion(self, weights: Tensor | None = None, smoothing: float = 0.0) -> Criterion:
        return nn.CrossEntropyLoss(weights, label_smoothing=smoothing)

    def meters(self, device: torch.device, *, training: bool) -> Meters:
        metrics: dict[str, Metric] = {
            f"top{rank}": MulticlassAccuracy(
                self.classes, top_k=min(rank, self.classes), average="micro", validate_args=False
            )
            for rank in ((1,) if training else (1, 5))
        }
        return Meters(metrics if training else {**metrics, "counts": _Counts(self.classes)}, device)

    def figures(self, found: Mapping[str, Any]) -> Figures:
        whole = {
            name: float(value) * (1 if name == "loss" else 100)
            for name, value in found.items()
            if name != "counts"
        }
        by_class = [
            {
                "images": images,
                "recall": 100 * both / images if images else math.nan,
                "precision": 100 * both / said if said else math.nan,
            }
            for images, said, both in (found["counts"].T.tolist() if "counts" in found else ())
        ]
        return Figures(whole, by_class)

    def of_batch(self, logits: Tensor, labels: Tensor) -> str:
        return f", top-1 {100 * (logits.argmax(1) == labels).float().mean().item():.1f} %"

    def describe(self, figures: Mapping[str, float], prefix: str = "") -> str:
        parts = [f"loss {figures[f'{prefix}loss']:.4f}"]
        for name, text in (("top1", "top-1"), ("top5", "top-5")):
            if prefix + name in figures:
                parts.append(f"{text} {figures[prefix + name]:.2f} %")
        return ", ".join(parts)


def masked_bce(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean binary cross entropy with logits over labels that are known, 0 without any.

    Args:
        logits: [N, classes].
        labels: [N, classes] of 0 and 1, and nan where nothing is known.
        weights: [classes], by which the terms of positives are multiplied.
    """
    known = ~labels.isnan()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = nn.functional.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(0.0), pos_weight=weights, reduction="none"
    )
    return torch.where(known, terms, 0.0).sum() / known.sum().clamp_min(1)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, ties half.

    nan without positives or without negatives; labels [N] that are nan do not count.
    """
    positives, negatives = scores[labels == 1], scores[labels == 0].sort().values
    if not len(positives) or not len(negatives):
        return math.nan
    above = sum(
        int(torch.searchsorted(negatives, positives, right=right).sum()) for right in (False, True)
    )
    return above / (2 * len(positives) * len(negatives))


class _Outputs(Metric):
    """All logits and labels."""

    full_state_update = False
    logits: Any  # a list of batches, or one tensor of all processes' after torchmetrics' exchange
    labels: Any

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "labels"):
            self.add_state(name, [], "cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.logits.append(logits.float())
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        logits, labels = (
            torch.cat(part) if isinstance(part, list) else part
            for part in (self.logits, self.labels)
        )
        return logits.cpu(), labels.cpu()


class Multilabel(Task):
    """Each label applies or not: sigmoid and binary cross entropy.

    Labels are 0, 1, or nan where nothing is known, [N, classes]. The loss is the mean over those
    that are known. Figures of a class are how many positives and negatives it has, and the AUROC;
    that of all images is the mean over the classes that have both.
    """

    name, best = MULTILABEL, "auroc"

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def balance(self, labels: Tensor) -> Tensor:
        """Of positives: negatives / positives."""
        return (labels == 0).sum(0) / (labels == 1).sum(0)

    def criterion(self, weights: Tensor | None = None, smoothing: float = 0.0) -> Criterion:
        assert not smoothing
        return lambda logits, labels: masked_bce(logits, labels, weights)

    def meters(self, device: torch.device, *, training: bool) -> Meters:
        return Meters({} if training else {"outputs": _Outputs()}, device)

    def figures(self, found: Mapping[str, Any]) -> Figures:
        if "outputs" not in found:
            return Figures({"loss": float(found["loss"])}, [])
        logits, labels = found["outputs"]
        by_class = [
            {
                "positives": int((truth == 1).sum()),
                "negatives": int((truth == 0).sum()),
                "auroc": auroc(scores, truth),
            }
            for scores, truth in zip(logits.T, labels.T, strict=True)
        ]
        areas = [row["auroc"] for row in by_class if not math.isnan(row["auroc"])]
        mean = sum(areas) / len(areas) if areas else math.nan
        # Of all labels at once: batches have different numbers of known ones.
        return Figures({"loss": float(masked_bce(logits, labels)), "auroc": mean}, by_class)

    def describe(self, figures: Mapping[str, float], prefix: str = "") -> str:
        text = f"loss {figures[f'{prefix}loss']:.4f}"
        if f"{prefix}auroc" not in figures:
            return text
        return f"{text}, AUROC {figures[f'{prefix}auroc']:.4f}"


def make_task(name: str, classes: int) -> Task:
    """The task of that name."""
    return {task.name: task for task in (Multiclass, Multilabel)}[name](classes)
