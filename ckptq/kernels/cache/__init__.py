"""Paged KV caches in the model's dtype or in FP8 under static scales: written, and attended to."""
