"""Training runs: configuration, the loop, metrics, the comparison of planners at the end."""
