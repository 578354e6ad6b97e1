"""What an engine makes of a checkpoint, asked of the engine itself, by names, shapes and dtypes."""
