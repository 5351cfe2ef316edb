"""Experiment definitions: one short absl app per experiment, no logic."""
