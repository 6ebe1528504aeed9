"""All that changes from step to step, and what a checkpoint restores of it."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import torch

from densenet_fast.model import EfficientDenseNet
from densenet_fast.train.checkpoints import Content
from densenet_fast.train.distributed import Processes
from densenet_fast.train.loop import Meters
from densenet_fast.train.optimization import (
    lr_factor,
    make_average,
    make_optimizer,
    make_scaler,
    slots,
)

_PADDING = 2**20  # bytes of a checkpoint beyond its tensors


class State:
    """The state of a run.

    `at` counts the steps done of the epoch `epoch`, `steps` those of all epochs; `seconds` is what
    the epoch has taken so far, `history` has a row for every finished one.
    """

    def __init__(
        self,
        arguments: Namespace,
        model: EfficientDenseNet,
        device: torch.device,
        classes: int,
        processes: Processes,
    ) -> None:
        self.model, self.device, self.classes = model, device, classes
        self.average = make_average(arguments, model, processes.count)
        self.optimizer = make_optimizer(arguments, model.parameters())
        self._lr, self._factor = arguments.lr, lr_factor(arguments)
        self.scaler = make_scaler(arguments, device)
        self.meters = self._new_meters()
        self.epoch = self.at = self.steps = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self._set_rates()
        self._slots = slots(arguments)

    def _new_meters(self) -> Meters:
        return Meters(self.classes, (1,), self.device)

    def next_epoch(self, row: dict[str, Any]) -> None:
        """Go on to the next epoch; `row` is what there is to say of the one that is over."""
        self.history.append(row)
        self.epoch, self.at, self.seconds = self.epoch + 1, 0, 0.0
        self._set_rates()
        self.meters = self._new_meters()

    def checkpoint_bytes(self) -> int:
        """About as much as a checkpoint takes."""
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        kept = weights * (2 if self.average is not None else 1)
        return kept + trained * self._slots + _PADDING

    def own(self) -> Content:
        """What every process has of its own: counts of this epoch, random generators."""
        on_gpu = self.device.type == "cuda"
        return {
            "meters": self.meters.state(),
            "rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def content(self) -> Content:
        """What all processes have in common, as checkpoints hold it."""
        average = self.average
        return {
            "epoch": self.epoch,
            "at": self.at,
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": None if average is None else average.module.state_dict(),
            "ema_updates": None if average is None else int(average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, content: Content, own: Content) -> None:
        """Go on from a checkpoint; `own` is what this process had of its own."""
        self.model.load_state_dict(content["model"])
        if self.average is not None:
            self.average.module.load_state_dict(content["ema"])
            self.average.n_averaged.fill_(content["ema_updates"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.at, self.steps = content["epoch"], content["at"], content["steps"]
        self.seconds, self.history = content["seconds"], content["history"]
        self._set_rates()
        if self.at:
            self.meters.restore(own["meters"], self.device)
        torch.set_rng_state(own["rng"])
        random.setstate(own["python_rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)

    def _set_rates(self) -> None:
        """The rates of this epoch; the epoch is all that there is to restore of their schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * self._factor(self.epoch)
