"""Decoder models: configuration, forward pass, attention, and the KV cache. The only package that imports Flax."""
