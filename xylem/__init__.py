"""Xylem: language models in JAX and Flax, from one laptop core to a TPU pod."""
