"""Which set of Linears gets which scheme: the least loss for a size, one layer in memory."""
