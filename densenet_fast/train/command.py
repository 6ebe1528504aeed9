"""The command `densenet-fast`."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from densenet_fast.train import errors, requirements, storage
from densenet_fast.train.arguments import make_parser

# Command → the module that runs it, what that imports, and what lets it take less memory.
COMMANDS = {
    "train": (
        "training",
        requirements.TRAIN,
        "a smaller --batch-size, --amp, or --checkpoint-mode auto with --memory-budget",
    ),
    "evaluate": ("evaluate", requirements.EVALUATE, "a smaller --batch-size or fewer --workers"),
    "predict": ("predict", requirements.PREDICT, "a smaller --batch-size"),
    "export": ("export", requirements.PREDICT, "a machine with more"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (see `densenet-fast --help`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be in no encoding
            stream.reconfigure(errors="backslashreplace")
    arguments = make_parser().parse_args(argv)
    module, needed, less = COMMANDS[arguments.command]
    try:
        requirements.require(needed, f"densenet-fast {arguments.command}")
        return importlib.import_module(f"densenet_fast.train.{module}").run(arguments)
    except errors.UsageError as error:
        return _fail(f"error: {error}", errors.WRONG_INPUT)
    except errors.TrainingError as error:
        return _fail(f"error: {error}", errors.FAILED)
    except errors.StoppedError as error:
        return _fail(str(error), error.status)
    except BrokenPipeError:  # whoever reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MemoryError, OSError, RuntimeError) as error:
        if lack := errors.lack_of_memory(error):
            return _fail(f"error: {lack.rstrip('.')}. Try {less}", errors.FAILED)
        if not isinstance(error, OSError):
            raise
        full = "the disk is full: " if error.errno in storage.FULL else ""
        return _fail(f"error: {full}{error}", errors.WRONG_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before is whole", 128 + signal.SIGINT)


def _fail(text: str, status: int) -> int:
    """Say what is wrong, and in which of several processes."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    where = f" [rank {os.environ.get('RANK')}]" if several else ""
    print(f"densenet-fast{where}: {text}", file=sys.stderr, flush=True)
    return status
