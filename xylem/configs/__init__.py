"""Runnable experiments, one Python function each."""
