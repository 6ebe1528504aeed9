"""What a run tells: a table (CSV), TensorBoard's events, lines and a progress bar."""

from __future__ import annotations

import csv
import io
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from densenet_fast.train.checkpoints import BEST, near_start
from densenet_fast.train.entries import EMA_START, MACHINE_ROW, row_of
from densenet_fast.train.storage import write_atomically
from densenet_fast.train.tasks import Task

CSV, EVENTS = "log.csv", "tensorboard"
Row = dict[str, Any]


def peak_memory(device: torch.device) -> float:
    """MiB: the most this process has had so far, allocated on a GPU or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def write_table(folder: Path, task: Task, rows: Sequence[Row], machine: Row | None = None) -> None:
    """The table of all epochs, accuracies in percent.

    What depends on the machine is in the table alone, not in checkpoints: `machine` has it for the
    last row, and earlier ones keep what the folder's table says of them, or nothing.
    """
    before = _lines(folder / CSV)
    columns = (*row_of(task.name, averaged=True), *MACHINE_ROW)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for at, row in enumerate(rows, 1):
        line = before.get(str(row["epoch"]), {})
        if machine is not None and at == len(rows):
            line = machine
        elif not {name: str(value) for name, value in row.items()}.items() <= line.items():
            line = {}  # another run's
        table.writerow({**{name: line.get(name) for name in MACHINE_ROW}, **row})
    write_atomically(folder / CSV, text.getvalue().encode())


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """A table's lines by epoch; none where it is not there, or no table."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", errors="replace") as file:
            return {line.get("epoch", ""): line for line in csv.DictReader(file)}
    except csv.Error:
        return {}


def summary(row: Row, task: Task) -> str:
    """An epoch in a line."""
    average = ""
    if EMA_START in row:
        average = f"; average's {task.describe(row, 'ema_val_')}"
        if near_start(row):
            average += (
                f" (still {100 * row[EMA_START]:.0f} % its first weights: the others decide {BEST})"
            )
    return (
        f"epoch {row['epoch']}: lr {row['lr']:.3g}, {task.describe(row, 'train_')}; "
        f"validation {task.describe(row, 'val_')}{average}; "
        f"{row['images_per_second']:.1f} images/s, peak {row['peak_memory_mib']:.0f} MiB, "
        f"{row['seconds']:.1f} s"
    )


class Events:
    """TensorBoard's events, over the number of steps so far."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote behind its checkpoint does not count any more.
        self._writer: Any = SummaryWriter(
            str(folder / EVENTS), purge_step=step + 1 if step else None
        )

    def step(self, step: int, loss: float) -> None:
        """The loss of one step's batch."""
        self._writer.add_scalar("step/loss", loss, step)

    def epoch(self, step: int, row: Row) -> None:
        """Everything in an epoch's row."""
        for name, value in row.items():
            self._writer.add_scalar(f"epoch/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Progress:
    """A bar over an epoch's steps, or a line now and then where there is no terminal."""

    def __init__(self, title: str, total: int, start: int, *, shown: bool, bar: bool) -> None:
        self._title, self._total = title, total
        self._at = start
        terminal = sys.stderr.isatty()
        self._lines = shown and not (bar and terminal)
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=title,
            disable=not (shown and bar and terminal),
            leave=False,
        )

    def advance(self) -> None:
        """One step more."""
        self._at += 1
        self._bar.update()

    def tell(self, text: str) -> None:
        """How it goes."""
        self._bar.set_postfix_str(text, refresh=False)
        if self._lines:
            print(f"{self._title} [{self._at}/{self._total}] {text}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
