"""Which runs a comparison consists of."""
