"""The Stiefel manifold: its geometry as functions of points, and as a geoopt manifold of weights of any layout."""
