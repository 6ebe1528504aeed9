"""Weights: files, the names in them, and what fits. Knows no module of ours."""
