"""Triton kernels by operation. What each means, in plain torch, is a `reference_*.py` beside their
tests, or this package's own `token_head/reference.py`, by which `evaluate` rounds on a CPU."""
