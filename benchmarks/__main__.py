"""Entry point of `python -m benchmarks`."""

import importlib.util
import sys

NEEDED = ("torch", "torchvision", "matplotlib", "numpy", "sklearn", "tqdm")

if __name__ == "__main__":
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:  # said before any of them is imported
        sys.exit(
            f"python -m benchmarks: error: {', '.join(missing)}: not installed here: "
            "`pip install '.[bench]'` in the repository's root installs all that is needed"
        )
    from benchmarks.cli import main

    sys.exit(main())
