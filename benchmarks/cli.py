"""The command line: `python -m benchmarks [suite] [options]`."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import environment, plots, report
from benchmarks.memory import AMP
from benchmarks.networks import densenet_bc
from benchmarks.peers import PEERS
from benchmarks.report import Record, write_json
from benchmarks.suites import DEFAULT_SUITE, SUITES, Options, Suite, errors, load, run_tasks
from densenet_fast.train import rules
from densenet_fast.train.errors import UsageError, flag
from densenet_fast.train.flag_types import whole
from densenet_fast.train.storage import write_atomically

# Option that not all suites take → its flag.
SUITE_FLAGS = {field.name: flag(field.name) for field in fields(Options) if field.default is None}
ALL = "all"
# The gate repeats in small what others measure, `growth` and `depth` contain `step`'s figures, and
# `latency` is of small work alone.
SUITES_OF_ALL = (
    *("training", "growth", "depth", "networks", "capacity"),
    *("quality", "finetune", "kernels"),
)
INTERRUPTED = 130  # exit status of a program stopped by Ctrl-C
_positive = whole(1)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(_positive, text.split(","))))


def _depths(text: str) -> tuple[int, ...]:
    depths = _numbers(text)
    try:
        for depth in depths:
            densenet_bc(depth, 1, batch_size=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return depths


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    named = {**SUITES, ALL: "all of them but step, latency and gate, and one page of their pages"}
    suites = "\n".join(f"  {name:10} {text}" for name, text in named.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure densenet_fast against the usual implementations.",
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "suite", nargs="?", choices=named, default=DEFAULT_SUITE, help="default: %(default)s"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="a few minutes on two cores (default)")
    form.add_argument("--full", action="store_true", help="larger networks, more rounds")
    parser.add_argument("--threads", type=_positive, help="default: PyTorch's own choice")
    parser.add_argument("--device", help="default: cuda where PyTorch sees a GPU, else cpu")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run that was stopped in DIR"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="without the progress bar")
    some = parser.add_argument_group("to run less, or other cases (names separated by commas)")
    some.add_argument("--peers", type=_names, help="implementations to compare")
    some.add_argument("--networks", type=_names, help="networks to measure")
    some.add_argument("--parts", type=_names, help="parts of the suite")
    some.add_argument("--growth-rates", type=_numbers, help="growth rates to measure")
    some.add_argument("--depths", type=_depths, help="depths to measure")
    some.add_argument("--dims", type=int, choices=(1, 2, 3), help="of the images (default: 2)")
    some.add_argument("--rounds", type=_positive, help="timed rounds, training steps or passes")
    some.add_argument("--amp", choices=AMP, help="type of autocast (default: none)")
    some.add_argument("--budgets", type=_numbers, metavar="MIB", help="memory to fit into, MiB")
    some.add_argument("--data", help='"digits", "fashion-mnist" or a folder with its files')
    return parser


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write results to {str(folder)!r}: {error}") from error
    return folder


def _known(what: str, names: tuple[str, ...] | None, known: Collection[str]) -> None:
    unknown = [name for name in names or () if name not in known]
    if unknown or names == ():
        named = ", ".join(map(repr, unknown)) or "an empty list"
        raise UsageError(f"unknown {what}: {named}; there are {', '.join(known)}")


def make_options(arguments: argparse.Namespace) -> tuple[Suite, Options]:
    """Check everything the user said; raises `UsageError` before any work."""
    device = rules.device(arguments.device)
    suite = load(arguments.suite)
    given = {name: getattr(arguments, name) for name in SUITE_FLAGS}
    for name, value in given.items():
        if value is not None and name not in suite.options:
            raise UsageError(f"{SUITE_FLAGS[name]} does not apply to the suite {arguments.suite!r}")
    _known("peer", arguments.peers, suite.known_peers or PEERS)
    missing = [name for name in arguments.peers or () if not PEERS[name].installed]
    if missing:
        need = ", ".join(dict.fromkeys(PEERS[name].requires for name in missing))
        raise UsageError(f"{', '.join(missing)}: not installed here: `pip install {need}`")
    _known("network", arguments.networks, suite.known_networks)
    _known("part", arguments.parts, suite.parts)
    output = _writable(arguments.output)
    return suite, Options(arguments.full, device, arguments.seed, output, **given)


def make_record(name: str, suite: Suite, options: Options, command: str) -> Record:
    """A record without figures yet."""
    return {
        "suite": name,
        "form": "full" if options.full else "quick",
        "command": command,
        "complete": False,
        "minutes": 0.0,
        "environment": environment.describe(options.device),
        **suite.plan(options),
    }


# What may differ between a run and its continuation.
MOMENTARY = ("date", "load_average_at_start")


def resumed(name: str, record: Record, output: Path) -> Record:
    """The record with the figures of the stopped run in `output`; `UsageError` if it does not fit.

    They must be of the same settings, machine and versions: a table mixes no two of them.
    """
    path = output / f"{name}.json"
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"there is nothing to resume: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{str(path)!r} is not a record of results: {error}") from error
    if not isinstance(old, dict) or "rows" not in old:
        raise UsageError(f"{str(path)!r} is not a record of results: it holds no rows")
    new = json.loads(json.dumps(record))
    for part in ("settings", "environment"):
        for key in sorted({*new[part], *old.get(part, {})}):
            was, now = old.get(part, {}).get(key), new[part].get(key)
            if was != now and key not in MOMENTARY:
                raise UsageError(
                    f"{str(path)!r} cannot be resumed: its {key} is {was!r}, and now it is {now!r}"
                )
    figures = {key: value for key, value in old.items() if isinstance(value, list) and key in new}
    return {**record, **figures, "minutes": old.get("minutes", 0.0)}


def page_of(name: str, suite: Suite, record: Record) -> str:
    """The page of a record."""
    found = (suite.tables(record), suite.findings(record), errors(record["rows"]))
    return report.page(name, suite.title, record, *found)


def run_suite(
    name: str, suite: Suite, options: Options, record: Record, *, visible: bool = True
) -> list[Path]:
    """Run a suite and write its results, partial ones after an interrupt or an error."""
    before, start = record["minutes"], time.monotonic()

    def save() -> Path:
        record["minutes"] = before + (time.monotonic() - start) / 60
        return write_json(options.output, name, record)

    # The signal of `kill` and of batch systems acts as Ctrl-C does.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_tasks(suite.tasks(options, record), save, visible=visible)
        record["complete"] = True
    except KeyboardInterrupt:
        print("\ninterrupted: keeping the partial results", file=sys.stderr)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        print(f"\nfailed: partial results are in {str(options.output)!r}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        path = options.output / f"{name}.md"
        plotted = plots.write(path, suite.tables(record), record["rows"])
        picture = f"\n![{suite.title}]({name}.png)\n" if plotted else ""
        write_atomically(path, (page_of(name, suite, record) + picture).encode())
        files = [save(), path, *plotted]
    return files


def _fail(message: str) -> NoReturn:
    print(f"python -m benchmarks: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_one(arguments: argparse.Namespace, command: str) -> int:
    """Run one suite and print its page; returns the exit status."""
    try:
        suite, options = make_options(arguments)
        record = make_record(arguments.suite, suite, options, command)
        if arguments.resume:
            record = resumed(arguments.suite, record, options.output)
    except UsageError as error:  # a DataError too
        _fail(str(error))
    files = run_suite(arguments.suite, suite, options, record, visible=not arguments.no_progress)
    print(f"\n{page_of(arguments.suite, suite, record)}")
    print("\n".join(f"wrote {path}" for path in files))
    failed = suite.failures(record)
    for text in failed:
        print(f"FAILED: {text}", file=sys.stderr)
    return int(bool(failed)) if record["complete"] else INTERRUPTED


def write_report(output: Path, names: Sequence[str]) -> Path:
    """One page of the suites' pages in `output`, with a table of contents and the losses."""
    records = [json.loads((output / f"{n}.json").read_text(encoding="utf-8")) for n in names]
    minutes = [f"{n} {record['minutes']:.0f}" for n, record in zip(names, records, strict=True)]
    contents = "\n".join(f"- [{load(name).title}](#{name})" for name in names)
    tables = [
        table
        for name, record in zip(names, records, strict=True)
        for table in load(name).tables(record)
    ]
    blocks = ["# Measurements", contents, f"Minutes: {', '.join(minutes)}."]
    blocks.append("## Where densenet_fast is not first")
    blocks.append(report.ranking(tables) or "Nothing was measured beside another implementation.")
    for name in names:
        page = (output / f"{name}.md").read_text(encoding="utf-8").splitlines()
        lowered = [f"#{line}" if line.startswith("#") else line for line in page]
        blocks.append("\n".join([f'<a id="{name}"></a>\n', *lowered, ""]))
    path = output / "report.md"
    write_atomically(path, "\n\n".join(blocks).encode())
    return path


def run_all(arguments: argparse.Namespace, command: str) -> int:
    """Run the suites of `all` and write one page; returns the worst exit status.

    `--resume` takes what there is: suites that were not reached before begin anew.
    """
    given = [flag for option, flag in SUITE_FLAGS.items() if getattr(arguments, option) is not None]
    if given:
        _fail(f"{', '.join(given)}: not with {ALL!r}, whose suites take different ones")
    status, done = 0, []
    for name in SUITES_OF_ALL:
        print(f"\n==== {name}")
        there = (arguments.output / f"{name}.json").exists()
        one = argparse.Namespace(**{**vars(arguments), "suite": name})
        one.resume = arguments.resume and there
        try:
            status = max(status, run_one(one, command))
        except Exception:  # its page says so; the other suites go on
            traceback.print_exc()
            status = max(status, 1)
        done.append(name)
        print(f"wrote {write_report(arguments.output, done)}")
        if status == INTERRUPTED:
            break
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(given)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # The peers' own warnings would tear the progress bar.
    warnings.filterwarnings("ignore", module=r"torch\.utils\.checkpoint")
    command = " ".join(["python -m benchmarks", *map(shlex.quote, given)])
    run = run_all if arguments.suite == ALL else run_one
    return run(arguments, command)
