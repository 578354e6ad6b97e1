"""Weights to FP8 and INT8 codes and back: rows, blocks, scales that are known."""
