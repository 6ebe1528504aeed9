"""`densenet-fast train`: epochs of training and validation, and everything saved in between."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_fast.train import checkpoints, data, records, setup
from densenet_fast.train.arguments import AUTO
from densenet_fast.train.batches import Augmented, Draws, Mixing, loader, read_batches
from densenet_fast.train.distributed import Processes, from_environment, together
from densenet_fast.train.entries import EMA_START
from densenet_fast.train.errors import StoppedError, UsageError
from densenet_fast.train.loop import Step, check_finite, validate
from densenet_fast.train.optimization import step_images
from densenet_fast.train.rules import complete, device
from densenet_fast.train.signals import StopRequest, stop_requests
from densenet_fast.train.state import State
from densenet_fast.train.storage import check_folder
from densenet_fast.train.tasks import make_task


def run(arguments: Namespace) -> int:
    """Train as the arguments say; returns the exit status.

    Raises:
        UsageError: nothing has been done yet, or the disk is full.
        TrainingError: the loss is not finite any more.
        StoppedError: a signal came; all is saved.
    """
    setup.adopt(arguments)
    arguments.model = arguments.model or setup.default_model(arguments)
    complete(arguments)
    processes = from_environment()
    where = device(arguments.device, processes.local_rank)
    arguments.device = where.type
    setup.settle(arguments)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    with together(processes, where, arguments.rendezvous_timeout):
        training = _Training(arguments, processes, where)
        with stop_requests() as request:  # until here, signals end the process at once
            return training.run(request)


class _Training:
    """A run: what its steps need, and the order of things."""

    def __init__(self, arguments: Namespace, processes: Processes, where: torch.device) -> None:
        self.arguments, self.processes, self.device = arguments, processes, where
        self.request = StopRequest()
        self.folder: Path = arguments.output_dir
        self.setting = data.open_data(arguments, processes, train=not arguments.test_only)
        source, plain = self.setting.source, self.setting.plain
        self.task = make_task(source.task, len(source.classes))
        self.architecture = setup.architecture_of(arguments, source)
        resumed = self._find_resumed()
        self.model = setup.make_model(
            arguments, self.architecture, where, resuming=resumed is not None
        )
        self.placement = setup.place(arguments, where)
        self.draws = Draws(len(source.train), step_images(arguments), arguments.seed, processes)
        crop = arguments.train_crop_size or self.setting.edge
        setup.check_batches(self.model, arguments, self.setting, crop, self.draws.images)
        criterion = setup.criterion(arguments, self.task, source, where)
        self.state = State(arguments, self.model, where, self.task, processes)
        self.seconds, self.first = 0.0, 0  # of this epoch's steps here, and the first of them
        if not arguments.test_only:
            if resumed is not None:
                self._check_resumed(resumed)
            processes.on_main(self._check_output)

        transform = setup.training_transform(arguments, self.setting, crop)
        images = Augmented(source.train, transform, arguments.seed)
        self.loader = loader(images, self.setting.workers, where, batch_sampler=self.draws)
        self.val_loader = data.validation_loader(
            self.setting, arguments.batch_size, processes, where
        )
        mixup, cutmix = arguments.mixup_alpha, arguments.cutmix_alpha
        self.mixing = Mixing(mixup, cutmix, self.task.classes, arguments.seed, processes.rank)
        setup.seed_noise(arguments.seed, processes.rank)
        if resumed is not None:
            if arguments.test_only:
                self.model.load_state_dict(resumed["model"])
            else:
                self.state.restore(resumed, resumed["by_process"][processes.rank])
        if processes.main and not arguments.test_only:
            self._warn_of_average()
            print(
                f"{self.architecture}; {source.name}: {len(source.train)} training images of "
                f"{crop}×{crop} pixels, {len(source.val)} validation images of "
                f"{plain.crop}×{plain.crop}",
                flush=True,
            )
        self.step = Step(
            self._wrapped(),
            self.state.optimizer,
            self.state.scaler,
            self.placement,
            criterion=criterion,
            batch_size=arguments.batch_size,
            clip=arguments.clip_grad_norm,
        )

    def _warn_of_average(self) -> None:
        """Say at the start if the average of the weights will hardly leave its own."""
        if self.state.average is None:
            return
        start = self.state.average_start_at_end(self.arguments, len(self.draws))
        if start > checkpoints.NEAR:
            print(
                f"--model-ema: with {len(self.draws)} steps an epoch, the average will still be "
                f"{100 * start:.0f} % its first weights at the end; a lower --model-ema-steps or "
                "--model-ema-decay lets it follow"
            )

    def _wrapped(self) -> nn.Module:
        """The network as steps call it; it shares its parameters with `self.model`."""
        wrapped: nn.Module = self.model
        if self.processes.count > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(wrapped, device_ids=ids)
        if self.arguments.compile:
            compiled: Any = torch.compile(wrapped)
            wrapped = compiled
        return wrapped

    def _check_resumed(self, content: checkpoints.Content) -> None:
        try:
            own = content["by_process"][self.processes.rank]
            self.state.check(content, own, len(self.draws))
        except UsageError as error:
            raise UsageError(f"{self._resumed_path} cannot be gone on from: {error}") from error

    def _check_output(self) -> None:
        names = (checkpoints.LAST, checkpoints.BEST)
        setup.check_output(
            self.folder,
            resuming=self.arguments.resume is not None,
            overwrite=self.arguments.overwrite,
            names=names,
        )
        missing = sum(not (self.folder / name).exists() for name in names)
        # One more than there will be at the end, while it is being written.
        check_folder(self.folder, self.state.checkpoint_bytes() * (1 + missing))

    def _find_resumed(self) -> checkpoints.Content | None:
        """The checkpoint to go on from, read by the main process for all."""
        path = self._resumed_path
        if path is None:
            return None

        def read() -> checkpoints.Content | None:
            if self.arguments.resume == AUTO and not path.exists():
                return None
            content = checkpoints.read(path)
            classes = self.setting.source.classes
            checkpoints.check_network(path, content, self.architecture, classes)
            if not self.arguments.test_only:
                now, count = data.described(self.setting), self.processes.count
                checkpoints.check_settings(path, content, self.arguments, now, count)
                setup.note_threads(content["threads"])
            return content

        return self.processes.on_main(read)

    @property
    def _resumed_path(self) -> Path | None:
        return setup.resumed_path(self.arguments)

    def _save(self, *, best: bool = False) -> None:
        """Write the checkpoints; all processes come here."""
        by_process = self.processes.gather(self.state.own())

        def write() -> None:
            content = {
                "architecture": self.architecture.to_dict(),
                "classes": list(self.setting.source.classes),
                "preprocessing": self.setting.plain.to_dict(),
                "task": self.task.name,
                "data": data.described(self.setting),
                "arguments": checkpoints.plain(self.arguments),
                "processes": self.processes.count,
                "threads": torch.get_num_threads(),
                "by_process": by_process,
                **self.state.content(),
            }
            checkpoints.save(self.folder, content, best=best)

        self.processes.on_main(write)

    def run(self, request: StopRequest) -> int:
        """All epochs that are left, until a signal comes."""
        self.request = request
        if self.arguments.test_only:
            return self._test()
        main, state = self.processes.main, self.state
        if main and state.history:  # what was written behind the checkpoint does not count
            records.write_table(self.folder, self.task, state.history)
        events = records.Events(self.folder, state.steps) if main else None
        try:
            while state.epoch < self.arguments.epochs and not self._out_of_patience():
                if self._ends() or not self._train_epoch(events):
                    return self._say_why()
                self._finish_epoch(events)
        finally:
            if events is not None:
                events.close()
        if main:
            print(f"{self.folder}: {checkpoints.LAST}, {checkpoints.BEST}, {records.CSV}")
        return 0

    def _best_epoch(self) -> int:
        """The first of those with the best figure in validation."""
        scores = [checkpoints.score(row, self.task.best) for row in self.state.history]
        return scores.index(max(scores))

    def _out_of_patience(self) -> bool:
        """Whether too many epochs were no better than an earlier one."""
        patience, history = self.arguments.patience, self.state.history
        if patience is None or not history or len(history) - 1 - self._best_epoch() < patience:
            return False
        if self.processes.main:
            print(f"epoch {self._best_epoch()} was the best: stopped by --patience {patience}")
        return True

    def _test(self) -> int:
        found = self._validate(self.model)
        if self.processes.main:
            print(f"{len(self.setting.source.val)} images: {self.task.describe(found)}")
        return 0

    def _validate(self, model: nn.Module) -> dict[str, float]:
        self.processes.same_buffers(model)
        found = validate(
            model,
            self.val_loader,
            self.placement,
            self.task,
            after_batch=self._leave_validation,
        )
        return found.whole

    def _leave_validation(self) -> None:
        """One process stops at once; of several, each finishes what the others wait for."""
        if self.request.number and self.processes.count == 1:
            if self.arguments.test_only:
                raise StoppedError(self.request.number, "nothing was saved")
            self._save()
            raise StoppedError(self.request.number, self._saved())

    def _train_epoch(self, events: records.Events | None) -> bool:
        """The steps that are left of this epoch; False where --steps ends the run."""
        arguments, state, total = self.arguments, self.state, len(self.draws)
        self.draws.epoch, self.draws.start = state.epoch, state.at
        self.model.train()
        self.first = state.at
        began = time.perf_counter()
        main = self.processes.main
        with records.Progress(
            f"epoch {state.epoch}", total, state.at, shown=main, bar=not arguments.no_progress
        ) as progress:
            for batch in read_batches(self.loader):
                images, labels = self.mixing(batch, state.epoch, state.at)
                loss, logits = self.step(images, labels)
                labels = self.mixing.hard(self.placement.labels(labels))
                state.meters.update(loss, logits, labels)
                self._average()
                state.at += 1
                state.steps += 1
                self.seconds = time.perf_counter() - began
                progress.advance()
                if state.at % arguments.print_freq == 0 or state.at == total:
                    value = loss.item()
                    check_finite(value, f"in step {state.at} of epoch {state.epoch}")
                    progress.tell(
                        f"loss {value:.4f}{self.task.of_batch(logits, labels)}, "
                        f"{self._speed():.1f} images/s, "
                        f"peak {records.peak_memory(self.device):.0f} MiB"
                    )
                    if events is not None:
                        events.step(state.steps, value)
                if self._leave_training():
                    return False
        return True

    def _average(self) -> None:
        """Count the weights in, every so many steps."""
        arguments, average = self.arguments, self.state.average
        if average is not None and self.state.at % arguments.model_ema_steps == 0:
            average.update_parameters(self.model)
            if self.state.epoch < arguments.lr_warmup_epochs:
                average.n_averaged.fill_(0)  # it begins when the rates are reached

    def _speed(self) -> float:
        """Images per second of all processes, in the steps of this epoch that were done here."""
        size = self.draws.batch_size
        first, last = (min(at * size, self.draws.images) for at in (self.first, self.state.at))
        return (last - first) * self.processes.count / max(self.seconds, 1e-9)

    def _leave_training(self) -> bool:
        """Save where a signal, --steps or --save-steps ask for it; True where --steps ends."""
        number = self.processes.largest(self.request.number)
        every = self.arguments.save_steps
        due = every is not None and self.state.steps % every == 0
        if number or due or self._ends():
            self._save()
        if number:
            raise StoppedError(number, self._saved())
        return self._ends()

    def _ends(self) -> bool:
        """Whether --steps are done."""
        return self.arguments.steps is not None and self.state.steps >= self.arguments.steps

    def _say_why(self) -> int:
        if self.processes.main:
            print(f"stopped after --steps {self.arguments.steps}; {self._saved()}")
        return 0

    def _saved(self) -> str:
        return (
            f"{self.folder / checkpoints.LAST} has epoch {self.state.epoch}, step "
            f"{self.state.at} of {len(self.draws)}: --resume auto goes on"
        )

    def _finish_epoch(self, events: records.Events | None) -> None:
        """Validate, and save the epoch with its row."""
        state = self.state
        trained = self.task.figures(state.meters.compute()).whole
        check_finite(trained["loss"], f"in epoch {state.epoch}")
        row: records.Row = {"epoch": state.epoch, "lr": state.optimizer.param_groups[0]["lr"]}
        row.update({f"train_{k}": v for k, v in trained.items()})
        row.update({f"val_{k}": v for k, v in self._validate(self.model).items()})
        if state.average is not None:
            found = self._validate(state.average.module)
            row.update({f"ema_val_{k}": v for k, v in found.items()})
            row[EMA_START] = state.average_start
        machine: records.Row = {
            "images_per_second": self._speed(),
            "peak_memory_mib": max(self.processes.gather(records.peak_memory(self.device))),
            "seconds": self.seconds,
        }
        state.next_epoch(row)
        best = self._best_epoch() == row["epoch"]
        self._save(best=best)
        if self.processes.main:
            records.write_table(self.folder, self.task, state.history, machine)
            print(records.summary({**row, **machine}, self.task), flush=True)
            if events is not None:
                events.epoch(state.steps, {**row, **machine})
