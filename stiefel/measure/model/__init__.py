"""What a model's constrained weights do: orthogonality, signals, dependence, effective rates."""
