"""The Stiefel manifold: its geometry as functions of points, and as geoopt wants it, over weights of any layout."""
