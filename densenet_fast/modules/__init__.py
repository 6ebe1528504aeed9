"""The networks' modules, and when they may run fused."""
