"""What a training step moves, computes and keeps, counted from a network's shape alone."""
