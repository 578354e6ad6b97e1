"""Checkpoints of the hub: downloaded into its cache, or read by ranges of bytes."""
