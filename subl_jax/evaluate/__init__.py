"""Behaviour readouts, matched contrasts, and the statistics that judge them."""
