"""Weights to packed INT4 codes and back, fused experts included."""
