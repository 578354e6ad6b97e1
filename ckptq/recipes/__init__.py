"""Recipes: the built-in YAML files, and the loader that reads any recipe of llm-compressor's dialect."""
