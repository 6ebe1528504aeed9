"""Runs the parts of a first run on a GPU, each in processes of its own: see first_run.sh.

A case that kills its process or leaves the GPU unusable is noted; the next ones get a new process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDERS = (
    ROOT,
    HERE,
    *(ROOT / "tests" / f for f in (".", "cuda_emulator", "modules", "operators")),
)
LOST = 3  # exit status of a process whose GPU answers no more
TOOLS = ("memcheck", "racecheck")
SANITIZED = "several_tiles and (dense-bfloat16 or dense-tf32)"


@dataclass(frozen=True)
class Part:
    """A part and how many seconds it may take."""

    title: str
    limit: float


PARTS = {
    0: Part("Build for this GPU", 120),
    1: Part("Operators against their reference twins", 60),
    2: Part("Small networks", 50),
    3: Part("compute-sanitizer on the products", 80),
    4: Part("Memory and time of a training step", 140),
    5: Part("Kernels against the roofline", 45),
    6: Part("The host's share of a step", 25),
}


class Results:
    """The file of all results: a line when a case begins, and one when it has ended."""

    def __init__(self, folder: Path) -> None:
        """In a folder that exists."""
        self.file = folder / "results.jsonl"
        self.log = folder / "log.txt"

    def add(self, part: int, case: str, **figures: Any) -> None:
        """Append one line."""
        with self.file.open("a") as file:
            file.write(json.dumps({"part": part, "case": case, **figures}) + "\n")

    def of(self, part: int) -> dict[str, dict[str, Any]]:
        """The last line of each case."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        entries = [entry for entry in map(json.loads, lines) if entry["part"] == part]
        return {entry["case"]: entry for entry in entries}

    def forget(self, part: int) -> None:
        """Drop what an earlier run has left."""
        if self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            self.file.write_text("".join(x for x in lines if json.loads(x)["part"] != part))

    def command(self, command: Sequence[str], limit: float, **environment: str) -> int | None:
        """Exit status of a command that writes to the log; None where it ran out of time."""
        with self.log.open("a") as log:
            log.write(f"==== {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
                    process.wait()


# ---- The process that runs the cases


def run_cases(results: Results, number: int, device_name: str, *, tiny: bool) -> int:
    """Run the cases of a part that have not begun yet."""
    stands_in = importlib.util.find_spec("torchvision") is None
    if stands_in:
        import naive_torchvision

        naive_torchvision.install()
    import first_run_cases
    import torch

    from benchmarks import environment, measure

    device = torch.device(device_name)
    results.add(0, "environment", stands_in=stands_in, **environment.describe(device))
    begun = results.of(number)
    with first_run_cases.on(device):
        for name, call in first_run_cases.PARTS[number](device, tiny=tiny):
            if name in begun:
                continue
            results.add(number, name, begun=True)
            start, error, figures = time.monotonic(), None, None
            try:
                figures = call()
            except Exception as raised:
                traceback.print_exc()
                error = f"{type(raised).__name__}: {raised}"[:2000]
            try:
                measure.synchronize(device)
                measure.release_cached(device)
            except RuntimeError as lost:
                results.add(number, name, error=f"{error or ''} {lost}".strip()[:2000])
                return LOST
            seconds = round(time.monotonic() - start, 3)
            results.add(number, name, took=seconds, error=error, **(figures or {}))
    return 0


# ---- The process that starts them


def run_part(results: Results, number: int, options: argparse.Namespace) -> None:
    """Run a part, in a new process as often as one is lost."""
    begin, limit = time.monotonic(), PARTS[number].limit * (20 if options.tiny else 1)
    if number == 0:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        # Vendors' containers list many architectures; without a list it is the GPU's own.
        wanted = {"DENSENET_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""}
        status = results.command(build, limit, **wanted)
        results.add(0, "build", error=_said(status), took=time.monotonic() - begin)
        return
    if number == 3:
        for tool in TOOLS:
            results.add(3, tool, begun=True)
            script = [sys.executable, str(HERE / "compute_sanitizer.py"), "--tool", tool]
            status = results.command([*script, "--", "-k", SANITIZED], limit / len(TOOLS))
            results.add(3, tool, error=_said(status))
        return
    command = [sys.executable, __file__, str(results.file.parent), "--child", str(number)]
    command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    while True:
        before = len(results.of(number))
        left = begin + limit - time.monotonic()
        status = results.command(command, left)
        if status in (0, None) or len(results.of(number)) == before:
            break
    if status != 0:
        results.add(number, "the part", error=_said(status))


def _said(status: int | None) -> str | None:
    if status is None:
        return "ran out of time"
    return f"exit status {status}, see log.txt" if status else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts or some; returns the exit status."""
    parser = argparse.ArgumentParser(description="The first ten minutes on a GPU.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/first_run"))
    parser.add_argument("--only", type=int, action="append", choices=list(PARTS), metavar="N")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest shapes, to test this on a CPU: without hurry",
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path[:0] = map(str, FOLDERS)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = Results(options.folder.resolve())
    if options.child is not None:
        return run_cases(results, options.child, options.device, tiny=options.tiny)
    from first_run_page import failed, page

    chosen = options.only or [n for n in PARTS if options.device == "cuda" or n not in (0, 3)]
    for number in chosen:
        print(f"{PARTS[number].title}, at most {PARTS[number].limit:.0f} s", flush=True)
        results.forget(number)
        run_part(results, number, options)
        found = {PARTS[n].title: results.of(n) for n in PARTS}
        (options.folder / "first_run.md").write_text(page(found))
        bad = failed(found[PARTS[number].title])
        print(f"  {len(results.of(number))} cases, {len(bad)} failed", flush=True)
    return int(any(failed(results.of(number)) for number in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
