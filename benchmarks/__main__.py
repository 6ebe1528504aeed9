"""Entry point of `python -m benchmarks`."""

import importlib.util
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:  # the command line itself needs it
        sys.exit(
            "python -m benchmarks: error: PyTorch is not installed here: "
            "`pip install '.[bench]'` in the repository's root installs all that is needed"
        )
    from benchmarks.cli import main

    sys.exit(main())
