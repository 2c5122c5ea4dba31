"""The claims of the paper's author about normalization and orthogonal weights: a file each, run by ``talk.py``."""
