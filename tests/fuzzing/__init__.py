"""Random configurations of the library: drawn from a seed, trained for some steps, and judged.

``models``: what is trained. ``optimizers``: what torch ships, by inspection. ``events``: what happens between steps.
``configuration``: one draw. ``trial``: one training run. ``judge``: its verdict. The command line is ``tests/fuzz.py``.
"""
