"""How good a quantized model is, in numbers: against its source, on tasks, and with a KV cache."""
