"""Run a checkpoint's model layer by layer and fold what its attention sees into scales."""
