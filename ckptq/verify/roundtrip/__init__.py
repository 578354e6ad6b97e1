"""Every tensor, read back and held against the source's: counts, and the verdict on them."""
