"""The MLP of ``omdsm.py`` by SGD with momentum 0.9: what to hold the released code against.

    stiefel compare benchmarks/momentum.py --budget small

There the sum of all gradients is momentum without decay. Where it trains a network faster than the corrected baselines,
which have none, the question is what these do with an ordinary one.
"""

from dataclasses import dataclass
from typing import ClassVar

from omdsm import OMDSM


@dataclass(frozen=True, kw_only=True)
class Momentum(OMDSM):
    """As there, but for the optimizer."""

    hyper: ClassVar = {"momentum": 0.9}
