"""A model that runs layer by layer, one in memory at a time, and taps on what passes in it."""
