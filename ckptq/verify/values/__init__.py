"""Numbers that can be told right or wrong without the source: scales and shapes."""
