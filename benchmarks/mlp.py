"""Every layer orthogonal, the last one too: the face-recognition MLP of Huang et al. (AAAI 2018), on data to be had.

5 layers of 128 ReLU units and the output layer, orthonormal rows in groups of 64; with and without normalization of
activations, by SGD and Adam. The paper's data are the PIE faces; here Fashion-MNIST, or the Olivetti faces.

    stiefel compare benchmarks/mlp.py --budget small --norm none batch
    stiefel compare benchmarks/mlp.py --budget small --optim adam --lr 0.0001 0.0003 0.001 0.003 0.01 0.03 0.1
    stiefel compare benchmarks/mlp.py --budget paper --data olivetti --batch-size 64

The paper's methods are `unconstrained`, `weight_norm` (whose lengths are learned), `own`, and `own:scale=learnable`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from parts import norms
from parts.groups import constrain_in_groups
from torch import nn

import stiefel
from stiefel.compare import Data, Problem, datasets, where

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True, kw_only=True)
class MLP(Problem):
    """An MLP with ``depth`` hidden layers of ``width`` units, all of whose layers are constrained."""

    epochs: int = 20
    depth: int = 5
    width: int = 128
    groups: int = 64  # outputs whose filters are orthonormal to each other; fewer where a layer has fewer
    norm: str = "none"  # of activations: none, batch, layer, group, whitening
    norm_place: str = "after"  # or before: the linear maps
    optim: str = "sgd"
    data: str = "digits"
    examples: int | None = None  # of the training data at most; a quarter as many to validate and test with
    data_dir: str | None = where(None, "folder with the files of the data set")

    budgets: ClassVar = {
        "tiny": {"epochs": (2,)},
        "small": {"data": ("fashion-mnist",), "examples": (6144,), "epochs": (6,), "batch_size": (256,)},
        "paper": {
            "data": ("fashion-mnist",), "epochs": (80,), "batch_size": (256,), "norm": ("none", "batch"),
        },
    }  # fmt: skip

    def make_model(self) -> nn.Module:
        """``inputs → (width, normalization, ReLU) × depth → classes``."""
        sizes = [64 if self.data == "digits" else 1024, *[self.width] * self.depth]
        net = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            linear = nn.Linear(inputs, outputs)
            norms.add(net, linear, (f"linear{i}", f"norm{i}"), self.norm, self.norm_place)
            net.add_module(f"relu{i}", nn.ReLU())
        net.add_module("head", nn.Linear(self.width, 40 if self.data == "olivetti" else 10))
        return net

    def constrain(self, model: nn.Module, method: stiefel.Constraint) -> nn.Module:
        """In groups, everywhere."""
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        return constrain_in_groups(model, method, names, self.groups)

    def make_data(self) -> Data:
        """Pixels in [0, 1] less their mean, 32×32 (digits are 8×8)."""
        return datasets.load(self.data, self.data_dir, examples=self.examples)

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:  # type: ignore[override]
        """SGD or Adam."""
        return OPTIMIZERS[self.optim]

    @property
    def target(self) -> float:  # type: ignore[override]
        """Validation accuracy that a run must reach."""
        return {"digits": 0.95, "olivetti": 0.8}.get(self.data, 0.86 if self.examples is None else 0.8)
