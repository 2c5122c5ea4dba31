"""The minimum of a loss over Stiefel manifolds and free numbers: quasi-Newton and Newton steps, without modules."""
