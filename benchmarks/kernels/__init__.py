"""Single kernels: the machine they are held against, and the calls that are timed."""
