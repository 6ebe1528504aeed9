"""`python -m densenet_fast.train` is `densenet-fast train`."""

import sys

from densenet_fast.train.command import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
