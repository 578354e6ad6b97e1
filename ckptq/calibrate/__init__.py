"""Fold what passes in a model into scales, and keep them in a file of their own."""
