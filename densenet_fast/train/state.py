"""All that changes from step to step, and what a checkpoint restores of it."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import torch

from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.train.checkpoints import Content
from densenet_fast.train.distributed import Processes
from densenet_fast.train.entries import MACHINE_ROW, check_tensors, row_of
from densenet_fast.train.errors import UsageError
from densenet_fast.train.optimization import (
    average_decay,
    counts_steps,
    kept,
    lr_factor,
    make_average,
    make_optimizer,
    make_scaler,
)
from densenet_fast.train.tasks import Meters, Task

_PADDING = 2**20  # bytes of a checkpoint beyond its tensors


class State:
    """The state of a run.

    `at` counts the steps done of the epoch `epoch`, `steps` those of all epochs; `history` has a
    row for every finished one. None of it depends on the clock: runs of one seed have the same.
    """

    def __init__(
        self,
        arguments: Namespace,
        model: EfficientDenseNet,
        device: torch.device,
        task: Task,
        processes: Processes,
    ) -> None:
        self.model, self.device, self.task = model, device, task
        self.average = make_average(arguments, model, processes.count)
        self._average_decay = average_decay(arguments, processes.count) if self.average else 0.0
        self.optimizer = make_optimizer(arguments, model)
        self._lr, self._factor = arguments.lr, lr_factor(arguments)
        self.scaler = make_scaler(arguments, device)
        self.meters = self._new_meters()
        self.epoch = self.at = self.steps = 0
        self.history: list[dict[str, Any]] = []
        self._set_rates()
        self._kept, self._counts = kept(arguments), counts_steps(arguments)

    def _new_meters(self) -> Meters:
        return self.task.meters(self.device, training=True)

    @property
    def average_start(self) -> float:
        """The share of the average that is still its first weights."""
        updates = 0 if self.average is None else int(self.average.n_averaged)
        return self._start_after(updates)

    def average_start_at_end(self, arguments: Namespace, epoch_steps: int) -> float:
        """`average_start` after all epochs of so many steps."""
        updates = epoch_steps // arguments.model_ema_steps if self.average is not None else 0
        return self._start_after(updates * (arguments.epochs - arguments.lr_warmup_epochs))

    def _start_after(self, updates: int) -> float:
        return self._average_decay ** (updates - 1) if updates else 1.0

    def next_epoch(self, row: dict[str, Any]) -> None:
        """Go on to the next epoch; `row` is what there is to say of the one that is over."""
        self.history.append(row)
        self.epoch, self.at = self.epoch + 1, 0
        self._set_rates()
        self.meters = self._new_meters()

    def checkpoint_bytes(self) -> int:
        """About as much as a checkpoint takes."""
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        held = weights * (2 if self.average is not None else 1)
        return held + trained * len(self._kept) + _PADDING

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
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": None if average is None else average.module.state_dict(),
            "ema_updates": None if average is None else int(average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def check(self, content: Content, own: Content, epoch_steps: int) -> None:
        """Refuse a checkpoint, right in itself, that this run could not have written.

        Args:
            content: the checkpoint, after `checkpoints.check_settings`.
            own: what this process had of its own.
            epoch_steps: steps of a whole epoch.

        Raises:
            UsageError: counts, or the state of the optimizer, the scaler or the meters, do not fit.
        """
        epoch, at, steps = content["epoch"], content["at"], content["steps"]
        if at > epoch_steps or steps != epoch * epoch_steps + at:
            raise UsageError(
                f"epoch {epoch}, at {at} and steps {steps} do not go together where an epoch has "
                f"{epoch_steps} steps"
            )
        if [row["epoch"] for row in content["history"]] != list(range(epoch)):
            raise UsageError(f"history: expected a row for each of {epoch} epochs")
        averaged = self.average is not None
        if any((content[name] is not None) != averaged for name in ("ema", "ema_updates")):
            raise UsageError(f"ema and ema_updates: expected {'both' if averaged else 'neither'}")
        names = row_of(self.task.name, averaged=averaged)
        for row in content["history"]:
            if different := set(names).symmetric_difference(row).difference(MACHINE_ROW):
                raise UsageError(
                    f"history[{row['epoch']}]: expected {', '.join(names)}, which "
                    f"{sorted(different)[0]} does not fit"
                )
        if content["scaler"].keys() != self.scaler.state_dict().keys():
            raise UsageError(f"scaler: expected {self.scaler.state_dict()}")
        if (own["cuda_rng"] is not None) != (self.device.type == "cuda"):
            raise UsageError(f"by_process: cuda_rng does not fit a run on {self.device.type}")
        self._check_optimizer(content["optimizer"], steps)
        if at:
            expected = self.meters.state()
            if own["meters"].keys() != expected.keys():
                raise UsageError(f"meters: expected {', '.join(expected)}")
            for name, values in expected.items():
                check_tensors(f"meters[{name!r}]", own["meters"][name], values)

    def _check_optimizer(self, found: Content, steps: int) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        if [part.get("params") for part in found["param_groups"]] != [g["params"] for g in groups]:
            sizes = ", ".join(str(len(group["params"])) for group in groups)
            raise UsageError(f"optimizer: expected {len(groups)} groups of {sizes} parameters")
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        parameters = dict(enumerate(ordered))
        if not found["state"]:  # no step has been done, or none that counts
            return
        if not found["state"].keys() <= parameters.keys():
            raise UsageError(f"optimizer: there are states of other than {len(parameters)} tensors")
        for number, parameter in parameters.items():
            expected = dict.fromkeys(self._kept, parameter)
            if self._counts:
                expected["step"] = torch.tensor(0.0)
            values = found["state"].get(number, {})
            values = {name: value for name, value in values.items() if value is not None}
            check_tensors(f"optimizer[{number}]", values, expected)
            if self._counts and not 1 <= values["step"] <= steps:
                raise UsageError(
                    f"optimizer[{number}]: expected a step from 1 to {steps}, got "
                    f"{values['step'].item()}"
                )

    def restore(self, content: Content, own: Content) -> None:
        """Go on from a checkpoint that `check` has seen; `own` is what this process had itself."""
        self.model.load_state_dict(content["model"])
        if self.average is not None:
            self.average.module.load_state_dict(content["ema"])
            self.average.n_averaged.fill_(content["ema_updates"])
        groups = self.optimizer.state_dict()["param_groups"]  # of the same flags
        state = content["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.at, self.steps = content["epoch"], content["at"], content["steps"]
        self.history = content["history"]
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
