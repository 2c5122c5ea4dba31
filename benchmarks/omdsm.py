"""Multiple dependent Stiefel manifolds: a deep MLP whose hidden weights are all orthogonal.

The MNIST experiment of Huang et al. (AAAI 2018): 4, 6 or 8 hidden layers of 100 ReLU units, the last layer free, plain
SGD, the learning rate halved half-way. Which method trains it, at which scale and learning rate?

    stiefel compare benchmarks/omdsm.py                      digits
    stiefel compare benchmarks/omdsm.py --budget small       a part of Fashion-MNIST, for two cores
    stiefel compare benchmarks/omdsm.py --budget paper       the paper's settings, on Fashion-MNIST or --data mnist

The paper's methods are `riemannian:metric=euclidean,retraction=qr` (EI+QR), `riemannian:metric=canonical,retraction=qr`
(CI+QR), `riemannian:metric=canonical,retraction=cayley` (CayT), `qr_projection` (QR), `own_pca` (OLM_var) and `own`
(OLM); `ei_qr_as_released` and so on are the first four with the faults of the released code.
"""

from dataclasses import dataclass
from typing import ClassVar

import parts.as_released  # noqa: F401  registers its methods
import torch
from torch import nn

from stiefel.compare import Data, Problem, datasets, where


@dataclass(frozen=True, kw_only=True)
class OMDSM(Problem):
    """An MLP with ``depth`` hidden layers of ``width`` units."""

    epochs: int = 35
    depth: int = 4
    width: int = 100
    bias: bool = True  # of the hidden layers; in the paper OWN's have none
    data: str = "digits"
    examples: int | None = None  # of the training data at most; a quarter as many to validate and test with
    data_dir: str | None = where(None, "folder with the files of the data set")

    exclude = ("head",)
    grid: ClassVar = {"depth": (4, 8)}
    budgets: ClassVar = {
        "tiny": {"epochs": (2,), "depth": (4,)},
        "small": {
            "data": ("fashion-mnist",), "examples": (6144,), "epochs": (8,), "batch_size": (256,), "depth": (4, 6, 8),
        },
        "paper": {"data": ("fashion-mnist",), "epochs": (80,), "batch_size": (1024,), "depth": (4, 6, 8)},
    }  # fmt: skip

    def make_model(self) -> nn.Module:
        """``inputs → (width, ReLU) × depth → 10``."""
        net = nn.Sequential()
        for layer in range(self.depth):
            inputs = self.width if layer else self._inputs
            net.add_module(f"hidden{layer + 1}", nn.Linear(inputs, self.width, bias=self.bias))
            net.add_module(f"relu{layer + 1}", nn.ReLU())
        net.add_module("head", nn.Linear(self.width, 10))
        return net

    def make_data(self) -> Data:
        """Pixels in [0, 1] less their mean, padded to 32×32 (digits are 8×8)."""
        return datasets.load(self.data, self.data_dir, examples=self.examples)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Half the rate for the second half, as the paper's 80 epochs halve it after 40."""
        return torch.optim.lr_scheduler.StepLR(optimizer, max(1, self.epochs // 2), gamma=0.5)

    @property
    def target(self) -> float:  # type: ignore[override]
        """Validation accuracy that a run must reach."""
        return {"digits": 0.95, "mnist": 0.97}.get(self.data, 0.86 if self.examples is None else 0.8)

    @property
    def _inputs(self) -> int:
        return 64 if self.data == "digits" else 1024
