"""Training, fine-tuning, evaluation and prediction from the command line.

`densenet-fast train|evaluate|predict|export`, or `python -m densenet_fast.train` for the first.
What these need beyond torch is the extra `train`; importing this package, and `load`, which gives
a trained network in Python, need nothing.
"""

from densenet_fast.train.loading import Loaded, load

__all__ = ["Loaded", "load"]
