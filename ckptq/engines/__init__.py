"""What each inference engine makes of a checkpoint, as data extracted from the engine itself."""
