"""Attention as pure functions of arrays: no Flax, no configuration."""
