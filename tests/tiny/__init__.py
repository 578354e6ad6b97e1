"""What all tests make tiny checkpoints of, and compare them by: one maker of each kind."""
