"""One line on the question: which constraint should this network have?

stiefel compare FILE                       every method, at scales 1 and √2
stiefel compare FILE --methods own soft --width 16 64
stiefel compare FILE --help                all options, and the factors below
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from stiefel.compare import Data, Problem


@dataclass(frozen=True, kw_only=True)
class MyProblem(Problem):
    """Every field is a factor of the experiment and an option of the command line; several values span a grid."""

    width: int = 32
    epochs: int = 20
    batch_size: int = 32

    # Validation metric that a run must reach to count as done. None: no target.
    target = 0.95
    # Names of layers to leave free; `layers = [...]` names those to constrain instead.
    exclude = ("head",)
    # Any torch.optim class, with its options but the learning rate, which is tuned for every method.
    optimizer = torch.optim.SGD
    hyper = {"momentum": 0.9}  # noqa: RUF012
    # The same logarithmic grid for all methods: three decades or more.
    learning_rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

    def make_model(self) -> nn.Module:
        """Your network. The generators are seeded before, so that all methods start from the same one."""
        net = nn.Sequential(nn.Linear(30, self.width), nn.ReLU(), nn.Linear(self.width, self.width), nn.ReLU())
        net.add_module("head", nn.Linear(self.width, 2))
        return net

    def make_data(self) -> Data:
        """Your data in three parts: tuples of tensors, or iterables of batches such as a DataLoader."""
        x, y = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, validation, test = order.split([369, 100, 100])
        return Data((x[train], y[train]), (x[validation], y[validation]), (x[test], y[test]))

    # The loss defaults to cross-entropy and the metric to accuracy. For another loss:
    #
    #     def loss(self, model, batch):
    #         inputs, targets = batch
    #         return torch.nn.functional.cross_entropy(model(inputs), targets, label_smoothing=0.1)
    #
    # For another metric, return it beside the loss, name it, and say which way is better:
    #
    #     metric = "error"
    #     higher_is_better = False
    #
    #     def evaluate(self, model, batch):
    #         inputs, targets = batch
    #         return {"error": (model(inputs).argmax(-1) != targets).float().mean().item()}
    #
    # With real targets, derive from stiefel.compare.Regression instead: mean squared error, less is better.
    # A schedule is stepped once per epoch:
    #
    #     def schedule(self, optimizer):
    #         return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
