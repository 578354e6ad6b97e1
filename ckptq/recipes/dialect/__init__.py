"""llm-compressor's dialect of recipes."""
