#!/usr/bin/env bash
# The first ten minutes on a machine with a GPU: builds in place for that GPU and looks at everything
# that no CPU can tell. Needs a CUDA toolkit, PyTorch >= 2.10 with CUDA, ninja, pybind11, setuptools,
# pytest and hypothesis, and no network.
#
#     bash tests/cuda/first_run.sh [FOLDER] [--only N ...]
#
# FOLDER (results/first_run) gets results.jsonl and log.txt as the results come, and first_run.md, a page of
# them. Each part has a limit of time, and goes on where another one fails. About nine minutes.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/first_run.py" "$@"
