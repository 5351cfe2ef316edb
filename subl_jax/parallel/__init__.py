"""Devices, meshes and placement: the seam between per-device programs (rollouts) and global ones (training)."""
