"""Multiple dependent Stiefel manifolds: a deep MLP whose hidden weights are all orthogonal.

The network is the one of Huang et al. (AAAI 2018): 4, 6 or 8 hidden layers of 100 ReLU units, the last layer free.

    stiefel compare benchmarks/omdsm.py --depth 4 8
    stiefel compare benchmarks/omdsm.py --data fashion-mnist --depth 4 6 8 --seeds 5
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from stiefel.compare import Data, Problem, datasets, where


@dataclass(frozen=True, kw_only=True)
class OMDSM(Problem):
    """An MLP with ``depth`` hidden layers of ``width`` units, on digits or Fashion-MNIST."""

    epochs: int = 35
    depth: int = 4
    width: int = 100
    data: str = "digits"
    data_dir: str | None = where(None, "folder with the idx files of Fashion-MNIST")

    exclude = ("head",)
    grid: ClassVar = {"depth": (4, 8)}
    budgets: ClassVar = {"tiny": {"epochs": (2,), "depth": (4,)}}

    def make_model(self) -> nn.Module:
        """``inputs → (width, ReLU) × depth → 10``; only the last layer has a bias (as OWN's layers have none)."""
        net = nn.Sequential()
        for layer in range(self.depth):
            inputs = self.width if layer else self._inputs
            net.add_module(f"hidden{layer + 1}", nn.Linear(inputs, self.width))
            net.add_module(f"relu{layer + 1}", nn.ReLU())
        net.add_module("head", nn.Linear(self.width, 10))
        return net

    def make_data(self) -> Data:
        """Pixels in [0, 1] less their mean."""
        return datasets.load(self.data, self.data_dir)

    @property
    def target(self) -> float:  # type: ignore[override]
        """Validation accuracy that a run must reach: above what a linear model has on either data set."""
        return 0.95 if self.data == "digits" else 0.86

    @property
    def _inputs(self) -> int:
        return 64 if self.data == "digits" else 1024
