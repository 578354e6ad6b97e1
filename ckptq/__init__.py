"""Offline conversion of Hugging Face checkpoints into compressed-tensors ones that vLLM serves."""

__version__ = "0.1.0"
