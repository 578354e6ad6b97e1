"""The model that transformers builds from config.json, on the meta device: modules and names."""
