"""Copying over 100 steps in the literature's cell: a short form of ``talk.py literature``."""

import pytest
import rnn
import torch

import stiefel


@pytest.mark.parametrize("method", ["matrix_exp", "unconstrained"])
def test_an_orthogonal_start_copies_over_100_steps_within_300(method) -> None:
    """Helfrich et al. (2018), Lezcano-Casado and Martínez-Rubio (2019): below half of what no memory has.

    It is the cell and the start that do it: the network without a constraint is there as soon.
    """
    torch.manual_seed(0)
    one = rnn.Recurrent(cell="modrelu", optim="rmsprop", recurrent=0.1, delay=100, hidden=100, steps=300)
    model = one.constrain(one.make_model(), stiefel.get(method))
    optimizer = stiefel.optimizer(model, one.optimizer, one.parameters(model, 1e-3), lr=1e-3)
    data = one.make_data()
    for batch in data.train:
        one.train_step(model, optimizer, batch)
        # Looked at on the batch that the step was on: one of training is as good as any, all are drawn anew.
        if one.loss(model, batch).item() < 0.4 * one.memoryless:
            break
    assert one.measure(model, [data.test])["relative_cross_entropy"] < 0.5
