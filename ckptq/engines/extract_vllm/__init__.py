"""A script for vLLM's own environment: see `__main__`. ckptq itself imports nothing of it."""
