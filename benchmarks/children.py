"""Measurements in a child process: a function is called there with plain data and returns some."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.measure import MeasurementError, OutOfMemoryError
from densenet_fast.train.errors import lack_of_memory

# The child sees exactly the modules that its parent sees.
BOOTSTRAP = (
    "import importlib, json, sys; request = json.loads(sys.argv[1]); "
    "sys.path[:] = request['path']; module = importlib.import_module(request['module']); "
    "result = getattr(module, request['function'])(**request['arguments']); "
    "print(json.dumps(result), flush=True)"
)


def ended(
    request: str, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """A child process that has done what is asked for."""
    return subprocess.run(
        [sys.executable, "-c", BOOTSTRAP, request],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def call_in_child(
    function: str,
    arguments: dict[str, Any],
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
    timeout: float = 1800.0,
) -> Any:
    """What `module:function` returns in a process of its own, at most `timeout` seconds long."""
    module, _, name = function.partition(":")
    path = [entry or os.getcwd() for entry in sys.path]
    request = {"path": path, "module": module, "function": name, "arguments": arguments}
    own = {**(environment or {}), "OMP_NUM_THREADS": str(threads)}
    try:
        child = ended(json.dumps(request), own, timeout)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"no result within {timeout:.0f} s") from error
    if child.returncode == -9:
        raise OutOfMemoryError("does not fit: the process was killed, most likely for its memory")
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        if lack_of_memory(RuntimeError(child.stderr)):
            raise OutOfMemoryError(f"does not fit: {last}")
        raise MeasurementError(f"exit status {child.returncode}: {last}")
    return json.loads(child.stdout.strip().splitlines()[-1])
