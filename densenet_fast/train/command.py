"""The command `densenet-fast`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import torch

from densenet_fast.train import errors, requirements, storage
from densenet_fast.train.arguments import make_parser

# Command → the module that runs it, and what that imports.
COMMANDS = {
    "train": ("training", requirements.TRAIN),
    "evaluate": ("evaluate", requirements.EVALUATE),
    "predict": ("predict", requirements.PREDICT),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (see `densenet-fast --help`)."""
    arguments = make_parser().parse_args(argv)
    module, needed = COMMANDS[arguments.command]
    try:
        requirements.require(needed, f"densenet-fast {arguments.command}")
        return importlib.import_module(f"densenet_fast.train.{module}").run(arguments)
    except errors.UsageError as error:
        return _fail(f"error: {error}", errors.WRONG_INPUT)
    except errors.TrainingError as error:
        return _fail(f"error: {error}", errors.FAILED)
    except errors.StoppedError as error:
        return _fail(str(error), error.status)
    except torch.OutOfMemoryError as error:
        how = "a smaller --batch-size, --amp, or --checkpoint-mode auto with --memory-budget"
        return _fail(f"error: {str(error).splitlines()[0]} Try {how}", errors.FAILED)
    except BrokenPipeError:  # whoever reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # of logs; checkpoints have their own words
        if error.errno not in storage.FULL:
            raise
        return _fail(f"error: the disk is full: {error}", errors.WRONG_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before is whole", 128 + signal.SIGINT)


def _fail(text: str, status: int) -> int:
    """Say what is wrong, and in which of several processes."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    where = f" [rank {os.environ.get('RANK')}]" if several else ""
    print(f"densenet-fast{where}: {text}", file=sys.stderr, flush=True)
    return status
