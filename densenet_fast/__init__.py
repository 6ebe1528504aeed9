"""Exact DenseNets in a fraction of the memory."""

from densenet_fast._version import __version__

__all__ = ["__version__"]
