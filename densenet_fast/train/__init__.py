"""Training, fine-tuning, evaluation and prediction from the command line.

`densenet-fast train|evaluate|predict`, or `python -m densenet_fast.train` for the first of them.
What it needs beyond torch is the extra `train`; importing this package needs nothing.
"""
