"""Repairs of tensors: moved, computed, or made again from the source."""
