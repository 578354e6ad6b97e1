"""The meaning of every kernel in plain torch, by another method than the kernel's."""
