"""What a family of models looks like on disk, as data."""
