"""Recipes: built-in YAML files, and the loader for any recipe of llm-compressor's dialect."""
