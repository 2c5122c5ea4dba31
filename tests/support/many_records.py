"""20,000 made-up records, 40 settings of 20 methods with 25 runs each: to measure how reading and reporting scale.

PYTHONPATH=tests/support python tests/support/many_records.py FOLDER [SETTINGS]
"""

import sys
from pathlib import Path

import numpy as np
from records import comparison

METHODS, RATES, SEEDS = 20, 14, 10
"""With a cost run, 25 runs of each method in each setting."""


def many(root: Path, settings: int = 40) -> None:
    """Write them."""
    levels = {f"m{i:02}" if i else "unconstrained": (0.9 - 0.01 * i, 10.0 ** -(i % 9)) for i in range(METHODS)}
    points = [{"depth": 4, "width": 8 * (k + 1)} for k in range(settings)]
    rates = (5e-4, *(float(f"{rate:.3g}") for rate in np.geomspace(1e-3, 10, RATES - 1)))
    comparison(root, levels, fields=points, rates=rates, seeds=SEEDS, epochs=5, faults=True)


if __name__ == "__main__":
    many(Path(sys.argv[1]), int((*sys.argv[2:], "40")[0]))
