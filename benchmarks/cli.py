"""The command line: `python -m benchmarks [suite] [options]`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.datasets import DataError
from benchmarks.networks import NETWORKS, densenet_bc
from benchmarks.suites import DEFAULT_SUITE, SUITES, Options, Record, Suite, load

# Module to import → distribution that has it.
REQUIREMENTS = {
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "numpy": "numpy",
}
# Option of a suite → flag of the command line.
SUITE_FLAGS = {
    "peers": "--peers",
    "networks": "--networks",
    "parts": "--parts",
    "growth_rates": "--growth-rates",
    "depths": "--depths",
    "rounds": "--rounds",
    "amp": "--amp",
    "budgets": "--budgets",
    "data": "--data",
}
INTERRUPTED = 130  # exit status of a program stopped by Ctrl-C


class UsageError(Exception):
    """The command cannot be carried out as it was given."""


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _rates(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _depths(text: str) -> tuple[int, ...]:
    depths = _rates(text)
    try:
        for depth in depths:
            densenet_bc(depth, 1, batch_size=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return depths


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    suites = "\n".join(f"  {name:10} {text}" for name, text in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure densenet_fast against the usual implementations.",
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", nargs="?", default=DEFAULT_SUITE, help="default: %(default)s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="a few minutes on two cores (default)")
    form.add_argument("--full", action="store_true", help="larger networks, more rounds")
    parser.add_argument("--threads", type=_positive, help="default: PyTorch's own choice")
    parser.add_argument("--device", help="default: cuda where PyTorch sees a GPU, else cpu")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true", help="without the progress bar")
    some = parser.add_argument_group("to run less, or other cases (names separated by commas)")
    some.add_argument("--peers", type=_names, help="implementations to compare")
    some.add_argument("--networks", type=_names, help="networks to measure")
    some.add_argument("--parts", type=_names, help="parts of the suite")
    some.add_argument("--growth-rates", type=_rates, help="growth rates to measure")
    some.add_argument("--depths", type=_depths, help="depths to measure")
    some.add_argument("--rounds", type=_positive, help="timed rounds, training steps or passes")
    amp = ("none", "float16", "bfloat16")
    some.add_argument("--amp", choices=amp, help="type of autocast (default: none)")
    some.add_argument("--budgets", type=_rates, metavar="MIB", help="memory to fit into, MiB")
    some.add_argument("--data", help='"digits", "fashion-mnist" or a folder with its files')
    return parser


def check_requirements() -> None:
    """Every module that the suites import must be there before the work begins."""
    missing = [REQUIREMENTS[m] for m in REQUIREMENTS if importlib.util.find_spec(m) is None]
    if missing:
        raise UsageError(
            f"the benchmarks need {', '.join(missing)}, not installed here: the extra `bench` "
            "has what they need, `pip install '.[bench]'` in the repository's root"
        )
    try:
        import densenet_fast  # noqa: F401
    except ImportError as error:
        raise UsageError(f"densenet_fast does not import ({error}): run `pip install .`") from error


def _device(text: str | None) -> torch.device:
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"unknown device {text!r}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"cannot measure on device {text!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"device {text!r} is not there: PyTorch sees {count} CUDA devices")
    return device


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write results to {str(folder)!r}: {error}") from error
    return folder


def _known(what: str, names: tuple[str, ...] | None, known: Sequence[str]) -> None:
    if names is None:
        return
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        named = ", ".join(map(repr, unknown)) or "an empty list"
        raise UsageError(f"unknown {what}: {named}; there are {', '.join(known)}")


def make_options(arguments: argparse.Namespace) -> tuple[Suite, Options]:
    """Check everything the user said; raises `UsageError` before any work."""
    if arguments.suite not in SUITES:
        raise UsageError(f"unknown suite {arguments.suite!r}; there are {', '.join(SUITES)}")
    check_requirements()
    device = _device(arguments.device)
    from benchmarks.peers import PEERS

    suite = load(arguments.suite)
    for option, flag in SUITE_FLAGS.items():
        if getattr(arguments, option) is not None and option not in suite.OPTIONS:
            raise UsageError(f"{flag} does not apply to the suite {arguments.suite!r}")
    _known("peer", arguments.peers, tuple(PEERS))
    _known("network", arguments.networks, tuple(NETWORKS))
    _known("part", arguments.parts, suite.PARTS)
    options = Options(
        full=arguments.full,
        device=device,
        seed=arguments.seed,
        peers=arguments.peers,
        networks=arguments.networks,
        parts=arguments.parts,
        growth_rates=arguments.growth_rates,
        depths=arguments.depths,
        rounds=arguments.rounds,
        amp=arguments.amp,
        budgets=arguments.budgets,
        data=arguments.data,
        output=_writable(arguments.output),
    )
    return suite, options


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """While it lasts, the signal of `kill` and of batch systems acts as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: it gets no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_suite(
    name: str, suite: Suite, options: Options, command: str, *, visible: bool = True
) -> tuple[Record, list[Path]]:
    """Run a suite and write its results, partial ones after an interrupt or an error."""
    from benchmarks import environment
    from benchmarks.progress import Progress
    from benchmarks.report import write_json, write_page

    record: Record = {
        "suite": name,
        "form": "full" if options.full else "quick",
        "command": command,
        "complete": False,
        "environment": environment.describe(options.device),
        **suite.plan(options),
    }

    def save() -> None:
        write_json(options.output, name, record)

    def publish() -> list[Path]:
        raw = write_json(options.output, name, record)
        return [raw, *write_page(options.output, name, suite.page(record), suite.figure(record))]

    try:
        with _termination_interrupts(), Progress(visible=visible) as progress:
            suite.run(options, record, progress, save)
        record["complete"] = True
    except KeyboardInterrupt:
        print("\ninterrupted: keeping the partial results", file=sys.stderr)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        publish()
        print(f"\nfailed: partial results are in {str(options.output)!r}", file=sys.stderr)
        raise
    return record, publish()


def _fail(message: str) -> NoReturn:
    print(f"python -m benchmarks: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(given)
    try:
        suite, options = make_options(arguments)
    except UsageError as error:
        _fail(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # The peers' own warnings would tear the progress bar.
    warnings.filterwarnings("ignore", module=r"torch\.utils\.checkpoint")
    command = " ".join(["python -m benchmarks", *map(shlex.quote, given)])
    try:
        record, files = run_suite(
            arguments.suite, suite, options, command, visible=not arguments.no_progress
        )
    except DataError as error:
        _fail(str(error))
    print(f"\n{suite.page(record).markdown()}")
    print("\n".join(f"wrote {path}" for path in files))
    failed = suite.failures(record)
    for text in failed:
        print(f"FAILED: {text}", file=sys.stderr)
    if not record["complete"]:
        return INTERRUPTED
    return 1 if failed else 0
