"""What a user writes: the problem, its file, its data."""
