"""Scripts for vLLM's own environment, in which neither ckptq nor pytest is installed."""
