"""Weights to packed INT4 codes and back."""
