"""Triton kernels, one operation a file, each with its meaning in plain torch under reference/."""
