"""Distillation: divergences, the logit filter, the training step and its loop. Trajectories in, a student out."""
