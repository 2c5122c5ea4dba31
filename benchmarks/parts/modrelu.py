"""The recurrent cell of the literature on orthogonal recurrent networks: modReLU, without a bias inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BIAS = 0.01
"""Biases start uniform in ±0.01, as Helfrich, Willmott and Ye (ICML 2018) have them."""


class ModReLU(nn.Module):
    """``z = W_ih x + W_hh h;  h ← z/|z| · max(0, |z| + b)``, of real states (Arjovsky, Shah and Bengio, ICML 2016).

    Named and called as ``torch.nn.RNN`` is, one layer from zero states.

    Args:
        inputs, hidden: features of the inputs and of the states.
        batch_first: must be true: inputs are ``(batch, steps, inputs)``.
    """

    def __init__(self, inputs: int, hidden: int, *, batch_first: bool) -> None:
        super().__init__()
        assert batch_first
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden, inputs))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden, hidden))
        self.bias = nn.Parameter(torch.empty(hidden).uniform_(-BIAS, BIAS))
        nn.init.kaiming_normal_(self.weight_ih_l0, nonlinearity="relu")
        nn.init.orthogonal_(self.weight_hh_l0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(batch, steps, inputs)`` to all states ``(batch, steps, hidden)`` and the last, ``(1, batch, hidden)``."""
        recurrent = self.weight_hh_l0.mT  # read once: a reparameterized matrix is computed when it is
        state, states = x.new_zeros(len(x), len(recurrent)), []
        for drive in (x @ self.weight_ih_l0.mT).unbind(1):
            z = drive + state @ recurrent
            state = z.sign() * (z.abs() + self.bias).relu()
            states.append(state)
        return torch.stack(states, 1), state.unsqueeze(0)
