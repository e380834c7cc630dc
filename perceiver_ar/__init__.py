"""A trainer for Perceiver AR: long-context autoregressive models in JAX."""
