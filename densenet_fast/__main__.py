"""`python -m densenet_fast` prints what is installed."""

from densenet_fast.build_info import build_info

if __name__ == "__main__":
    print(build_info())
