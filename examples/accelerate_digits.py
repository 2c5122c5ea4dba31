"""A loop of Hugging Face Accelerate with orthogonal weights: two lines differ from the plain one.

pip install stiefel accelerate scikit-learn
accelerate launch --num_processes 2 --cpu examples/accelerate_digits.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import stiefel


def main(method: str = "own", epochs: int = 5) -> nn.Module:
    """Train on as many processes as there are, and print how orthogonal the weights are."""
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    model: nn.Module = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    stiefel.constrain(model, method, exclude=["6"], scale="relu")  # the first line
    optimizer = stiefel.optimizer(model, torch.optim.Adam, lr=1e-3)  # the second
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(data, 64, shuffle=True), scheduler
    )
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels) + stiefel.penalty(model)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        accelerator.print(f"loss {loss.item():.3f}")
    plain = accelerator.unwrap_model(model)
    accelerator.print(stiefel.report(plain))
    weight = next(iter(plain.parameters())).detach().clone()
    assert torch.equal(accelerator.gather(weight[None])[0], weight), "every process has the same weights"
    return plain


if __name__ == "__main__":
    main()
