"""Weights to FP8 and INT8 codes and back: rows, tensors, heads, blocks, fused experts."""
