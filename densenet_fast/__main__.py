"""`python -m densenet_fast` prints what is installed; with arguments, it is `densenet-fast`."""

import sys

from densenet_fast.build_info import build_info
from densenet_fast.train.command import main

if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main())
    print(build_info())
