"""Multiple dependent Stiefel manifolds: a deep MLP whose hidden weights are all orthogonal.

The MNIST experiment of Huang et al. (AAAI 2018): 4, 6 or 8 hidden layers of 100 ReLU units, the last layer free, plain
SGD, the learning rate halved half-way. Which method trains it, at which scale and learning rate?

    stiefel compare benchmarks/omdsm.py                      digits
    stiefel compare benchmarks/omdsm.py --budget small       a part of Fashion-MNIST, for two cores
    stiefel compare benchmarks/omdsm.py --budget paper       the paper's settings, on Fashion-MNIST or --data mnist
    stiefel compare benchmarks/omdsm.py --bias False --norm none batch layer whitening --norm-place before after

The paper's methods are `riemannian:metric=euclidean,retraction=qr` (EI+QR), `riemannian:metric=canonical,retraction=qr`
(CI+QR), `riemannian:metric=canonical,retraction=cayley` (CayT), `qr_projection` (QR), `own_pca` (OLM_var) and `own`
(OLM); `ei_qr_as_released` and so on are the first four with the faults of the released code, `olm_var_as_released` and
`olm_as_released` the last two as that code has them. Its network without a constraint starts as torch's layers do:
that is `default`.

Released OLM layers have no bias, all others one. So `bias` is a factor: with it or without it, for every method.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from parts import norms
from parts.as_released import Proxy
from parts.groups import constrain_in_groups
from torch import nn

import stiefel
from stiefel.compare import Data, Problem, datasets, where
from stiefel.errors import ProblemError


@dataclass(frozen=True, kw_only=True)
class OMDSM(Problem):
    """An MLP with ``depth`` hidden layers of ``width`` units."""

    epochs: int = 35
    depth: int = 4
    width: int = 100
    bias: bool = True  # of the hidden layers
    norm: str = "none"  # of activations: none, batch, layer, group, whitening
    norm_place: str = "after"  # or before: the hidden linear maps
    decay: str = "half"  # of the rate: once half-way, as in the paper, or by a cosine to nearly nothing
    data: str = "digits"
    examples: int | None = None  # of the training data at most; a quarter as many to validate and test with
    data_dir: str | None = where(None, "folder with the files of the data set")

    exclude = ("head",)
    grid: ClassVar = {"depth": (4, 8), "bias": (True, False)}
    budgets: ClassVar = {
        "tiny": {"epochs": (2,), "depth": (4,), "bias": (False,)},
        "small": {
            "data": ("fashion-mnist",), "examples": (6144,), "epochs": (8,), "batch_size": (256,), "depth": (4, 6, 8),
            "bias": (True, False),
        },
        "paper": {
            "data": ("fashion-mnist",), "epochs": (80,), "batch_size": (1024,), "depth": (4, 6, 8),
            "bias": (True, False),
        },
    }  # fmt: skip

    def make_model(self) -> nn.Module:
        """``inputs → (width, ReLU) × depth → 10``."""
        net = nn.Sequential()
        for i in range(1, self.depth + 1):
            hidden = nn.Linear(self.width if i > 1 else self._inputs, self.width, bias=self.bias)
            norms.add(net, hidden, (f"hidden{i}", f"norm{i}"), self.norm, self.norm_place)
            net.add_module(f"relu{i}", nn.ReLU())
        net.add_module("head", nn.Linear(self.width, 10))
        return net

    def constrain(self, model: nn.Module, method: stiefel.Constraint) -> nn.Module:
        """All hidden layers; those of released OLM are in groups of rows and lose their biases, which they have not."""
        if not isinstance(method, Proxy):
            return super().constrain(model, method)
        hidden = [name for name, _ in model.named_children() if name.startswith("hidden")]
        for name in hidden:
            model.get_submodule(name).register_parameter("bias", None)
        return constrain_in_groups(model, method, hidden, method.rows)

    def make_data(self) -> Data:
        """Pixels in [0, 1] less their mean, padded to 32×32 (digits are 8×8)."""
        return datasets.load(self.data, self.data_dir, examples=self.examples)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay not in ("half", "cosine"):
            raise ProblemError(f"decay={self.decay!r}: expected half or cosine")

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Half the rate for the second half (the shorter one), as the paper's 80 epochs halve it after 40; or a cosine.

        A rate that stays large leaves the noise of its last steps in the score.
        """
        if self.decay == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return torch.optim.lr_scheduler.StepLR(optimizer, math.ceil(self.epochs / 2), gamma=0.5)

    @property
    def target(self) -> float:  # type: ignore[override]
        """Validation accuracy that a run must reach."""
        return {"digits": 0.95, "mnist": 0.97}.get(self.data, 0.86 if self.examples is None else 0.8)

    @property
    def _inputs(self) -> int:
        return 64 if self.data == "digits" else 1024
