"""Benchmarks of `densenet_fast` against the usual implementations: run `python -m benchmarks`."""
