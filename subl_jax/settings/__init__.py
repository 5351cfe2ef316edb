"""Behavioural settings: one folder each, found by name in `registry`."""
