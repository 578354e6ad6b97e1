"""Other programs, in processes of their own: vLLM and lm-eval."""
