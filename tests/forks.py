"""Code in processes of its own that need not import what it needs: forks of one that has.

Importing PyTorch takes longer than most tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple


class Done(NamedTuple):
    """How code ended in its fork: the exit status, negative for a signal, and what it printed."""

    status: int
    printed: str
    errors: str


Forks = Callable[[str], Done]

SERVE = """
import json, os, signal, sys, tempfile, traceback
for line in sys.stdin:
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        signal.alarm(600)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        status = 1
        try:
            exec(json.loads(line))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    texts = [file.seek(0) or file.read() for file in files]
    print(json.dumps([status, *texts]), flush=True)
"""


@contextmanager
def forking(setup: str, environment: Mapping[str, str] = os.environ) -> Iterator[Forks]:
    """A function that runs code in a fork of a process that has run `setup`."""
    command = [sys.executable, "-c", f"import sys\nsys.path[:] = {sys.path!r}\n{setup}{SERVE}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        into, out = server.stdin, server.stdout

        def run(code: str) -> Done:
            print(json.dumps(code), file=into, flush=True)
            status, printed, errors = json.loads(out.readline())
            return Done(os.waitstatus_to_exitcode(status), printed, errors)

        yield run
