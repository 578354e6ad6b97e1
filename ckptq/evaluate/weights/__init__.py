"""Weights of a row: a scheme applied in memory, the control."""
