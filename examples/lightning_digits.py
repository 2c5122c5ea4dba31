"""A Lightning module with orthogonal weights: two lines differ from the plain one.

pip install stiefel lightning scikit-learn
python examples/lightning_digits.py
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import stiefel


class Digits(lightning.LightningModule):
    """A classifier of handwritten digits.

    Args:
        method: how its weights are kept orthogonal: a name from ``stiefel.available()``.
    """

    def __init__(self, method: str = "retraction") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        stiefel.constrain(self.net, method, exclude=["6"], scale="relu")  # the first line

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch, with the penalty of methods that have one."""
        x, y = batch
        return cross_entropy(self(x), y) + stiefel.penalty(self)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer for all weights."""
        return stiefel.optimizer(self, torch.optim.Adam, lr=1e-3)  # the second


def loaders(batch: int = 64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Digits for training and validation."""
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    parts = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(parts[0], batch, shuffle=True), DataLoader(parts[1], 512)


def main(method: str = "retraction", **trainer: Any) -> Digits:
    """Train, and print how orthogonal the weights are."""
    lightning.seed_everything(0)
    model = Digits(method)
    lightning.Trainer(max_epochs=5, gradient_clip_val=1.0, logger=False, **trainer).fit(model, *loaders())
    print(stiefel.report(model))
    return model


if __name__ == "__main__":
    main()
