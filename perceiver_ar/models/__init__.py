"""Flax modules: they see logical axis names and never a mesh."""
