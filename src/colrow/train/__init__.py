"""Training: configuration, data, loop, metrics, resume."""
