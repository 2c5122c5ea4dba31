"""Weights that are computed from proxies: by one, in a batch, ahead of the layers, in a compiled graph."""
