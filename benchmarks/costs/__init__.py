"""What ``benchmarks/cost.py`` is made of.

cases → maps, steps, nets → sections → targets → tables, picture; rounds measures. Builds on ``stiefel.measure``.
"""
