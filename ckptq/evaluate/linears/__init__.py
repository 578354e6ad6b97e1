"""Products with quantized weights, and what goes into them."""
