"""The meaning of each weight format in plain torch: scale, round, pack, and back."""
