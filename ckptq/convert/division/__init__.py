"""A conversion divided among jobs."""
