"""KV caches with scales per token and head, rotated or not: written, and attended to."""
