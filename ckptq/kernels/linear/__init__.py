"""Products of quantized Linears: W8A8, FP8 blocks, W4A16."""
