"""Throughput workloads: ours and peers timed interleaved on one machine, rows of MEASURING's contract out."""
