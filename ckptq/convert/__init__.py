"""Move the bytes: read, split experts, permute, quantize, pack, write. Obeys the plan."""
