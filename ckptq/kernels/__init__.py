"""Triton kernels by operation, each with its meaning in plain torch in the folder's reference."""
