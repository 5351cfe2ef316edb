"""Rollouts: a model acts in an environment, token in and token out. Yields finished trajectories."""
