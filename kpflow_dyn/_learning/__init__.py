"""Learning itself: forecasts under a frozen kernel, gradient flows, and how the operators change in training."""
