"""RSDM against dense rotations."""

import itertools

import numpy as np
import pytest
import torch
from formulas import close, every_dtype, every_shape, gaussian, orthonormal, residual, stepped

import stiefel


def dense_rotation(x, u):
    """X (I − A/2)⁻¹(I + A/2), A = ½(XᵀU − UᵀX), by numpy."""
    x, u = x.numpy(), u.numpy()
    a, eye = (x.T @ u - u.T @ x) / 2, np.eye(x.shape[1])
    return torch.from_numpy(x @ np.linalg.inv(eye - a / 2) @ (eye + a / 2))


@every_shape
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_rsdm_with_all_columns_is_the_dense_rotation(shape, size):
    """Whatever the order in which the columns are drawn."""
    x, u = orthonormal(2, *shape), size * gaussian(2, *shape, seed=1)
    for taken in range(3):
        moved = stepped(stiefel.get("rsdm", share=1.0), x, u, 0.1, taken=taken)
        for i in range(2):
            assert close(moved[i], dense_rotation(x[i], u[i]), 1e-12 * (1 + size))


@pytest.mark.parametrize(("n", "share", "drawn"), [(5, 0.5, 2), (5, 0.4, 2), (6, 0.5, 3), (6, 0.01, 2), (1, 0.5, 1)])
def test_rsdm_rotates_as_many_columns_as_its_share(n, share, drawn):
    x, u = orthonormal(1, min(3, n), n), gaussian(1, min(3, n), n, seed=1)
    moved = stepped(stiefel.get("rsdm", share=share), x, u, 0.1)
    changed = ((moved - x).abs().amax(dim=(0, 1)) > 1e-9).sum().item()
    assert changed == (drawn if n > 1 else 0)  # one coordinate has no rotation


@pytest.mark.parametrize(("n", "drawn"), [(5, 2), (5, 3), (6, 3)])
def test_rsdm_mean_step_is_the_stated_share_of_the_whole(monkeypatch, n, drawn):
    """Over all subsets of r columns the step averages to r(r−1)/(n(n−1)) of the whole one, to first order."""
    x, u = orthonormal(1, 3, n), 1e-6 * gaussian(1, 3, n, seed=1)
    method, mean, subsets = stiefel.get("rsdm", share=drawn / n), 0.0, list(itertools.combinations(range(n), drawn))
    for subset in subsets:
        order = torch.tensor([*subset, *(set(range(n)) - set(subset))])
        monkeypatch.setattr(torch, "randperm", lambda size, order=order, **_: order)
        mean = mean + (stepped(method, x, u, 0.1) - x) / len(subsets)
    whole = stepped(stiefel.get("rsdm", share=1.0), x, u, 0.1) - x
    share = drawn * (drawn - 1) / (n * (n - 1))
    assert close(mean, share * whole, 1e-10)
    assert close(whole, (u - x @ u.mT @ x) / 2, 1e-10)  # (a, b) = (1, ½)


@pytest.mark.sampled(3, values=False)
@every_dtype
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_rsdm_stays_orthonormal_for_thousands_of_steps(dtype, share):
    torch.manual_seed(0)
    method, x = stiefel.get("rsdm", share=share), orthonormal(2, 3, 8).to(dtype)
    for taken in range(2000):
        x = stepped(method, x, torch.randn(2, 3, 8, dtype=dtype), 0.1, taken=taken)
    assert residual(x).max() < 16 * torch.finfo(dtype).eps


def test_draws_depend_on_the_seed_and_the_steps_taken_alone():
    x, u = orthonormal(1, 3, 40), gaussian(1, 3, 40, seed=1)
    method = stiefel.get("rsdm")

    def moved(method, taken):
        return (stepped(method, x, u, 0.1, taken=taken) - x).abs().amax(dim=(0, 1)) > 1e-9

    torch.manual_seed(1)
    first, state = moved(method, 5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(moved(method, 5), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator
    draws = {tuple(moved(method, taken).tolist()) for taken in range(20)}
    draws |= {tuple(moved(stiefel.get("rsdm", seed=seed), 0).tolist()) for seed in range(1, 20)}
    assert len(draws) == 39
    # Each coordinate about equally often: 200 draws of half of them, whose standard deviation is 7.
    often = sum(moved(method, taken).int() for taken in range(200))
    assert 65 <= often.min() <= often.max() <= 135


@pytest.mark.parametrize("seed", [-1, 0.5, True, 2**31, "a"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(stiefel.OptionError, match="seed="):
        stiefel.get("rsdm", seed=seed)
