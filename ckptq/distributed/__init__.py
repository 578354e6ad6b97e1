"""Several processes at one task, started by torchrun."""
