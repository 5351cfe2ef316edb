"""What the launchers share: the command they start, the supervision of processes, cluster commands, preflight analysis."""
