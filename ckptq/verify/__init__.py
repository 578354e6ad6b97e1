"""Is what an engine will serve what the source meant? Opens a finished checkpoint as a stranger."""
