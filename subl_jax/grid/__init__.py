"""The grid of pairs, seeds and settings: what is run, how its cells are kept, analysed and printed."""
