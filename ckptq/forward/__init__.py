"""A model that runs layer by layer, one layer in memory at a time, and taps into it."""
