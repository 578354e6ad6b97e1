"""Text of any kind becomes token ids, and these become batches."""
