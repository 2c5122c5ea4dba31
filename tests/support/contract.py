"""What the tests of the public calls share: models, training, and what is compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stiefel
import stiefel.methods

METHODS = stiefel.available()


FEASIBLE = [m for m in METHODS if stiefel.get(m).feasible]


FORWARD = [m for m in METHODS if stiefel.get(m).place == "forward"]


IN_PLACE = [m for m in METHODS if stiefel.get(m).place != "forward"]


NOT_STEPPED = [m for m in METHODS if stiefel.get(m).place != "step"]


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.02}),
}


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    """A few steps that pull the output towards a constant; seeded, as for a network with dropout."""
    torch.manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (output(model, x) - 0.3).square().mean() + stiefel.penalty(model)
        loss.backward()
        optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a layer returns first; a recurrent cell runs twice, since its first state is zero."""
    y = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    if isinstance(model, nn.RNNCellBase):
        y = model(x, y)
    return y[0] if isinstance(y, tuple) else y


def names(model: nn.Module) -> list[str]:
    return [row.name for row in stiefel.report(model).rows]


def gram_error(rows: Tensor, scale: float = 1.0) -> float:
    """Largest entry of W Wᵀ/s² − I, of a matrix or a batch, by definition rather than through the library."""
    x = rows.double() / scale
    return (x @ x.mT - torch.eye(x.shape[-2], dtype=x.dtype)).abs().max().item()


def polar_factor(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


def assert_feasible(model: nn.Module, method: str) -> None:
    if stiefel.get(method).feasible:
        assert stiefel.report(model).worst < 1e-5


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


def tied() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 5, bias=False), "b": nn.Linear(5, 5, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def trained(method: str, steps: int = 3) -> nn.Sequential:
    model = stiefel.constrain(mlp(), method, scale="relu")
    train(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.05), batch(4, 6), steps=steps)
    return model
