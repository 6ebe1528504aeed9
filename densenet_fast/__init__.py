"""Exact DenseNets in a fraction of the memory."""

from densenet_fast._version import __version__
from densenet_fast.build_info import build_info

__all__ = ["__version__", "build_info"]
