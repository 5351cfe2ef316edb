"""Results in the formats of other tools: Inspect logs, JSON Lines for TRL and `datasets`, and cards written from artifacts.

A finished run, or the committed cells of a grid, come in; a folder that other tools open comes out. Nothing is trained,
evaluated or guessed here: what the artifacts do not say, the exports say they do not know.
"""
