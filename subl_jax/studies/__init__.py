"""Studies of the framework itself: one question each, answered by the stages of the experiments and by a few of its own."""
