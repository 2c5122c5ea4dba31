"""Matrices with known spectra, and single steps of methods, for tests of formulas."""

import numpy as np
import pytest
import torch
from common import gaussian
from torch import nn

import stiefel
from stiefel.constraint import Reparameterization, StepMethod
from stiefel.layout import Layout
from stiefel.methods import method_class

SHAPES = [(3, 8), (2, 5), (4, 5), (4, 4), (5, 5), (1, 6), (2, 3), (1, 1)]


DTYPES = [torch.float32, torch.float64]


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def orthonormal(*shape, seed=10, dtype=torch.float64):
    q, _ = torch.linalg.qr(gaussian(*shape, seed=seed, dtype=dtype).mT)
    return q.mT.contiguous()


def spectrum(p, n, values, seed=20):
    """A p×n matrix with given singular values and random singular vectors."""
    s = torch.as_tensor(values, dtype=torch.float64)
    return orthonormal(p, p, seed=seed) @ (s[..., :, None] * orthonormal(p, n, seed=seed + 1))


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def residual(x):
    """‖XXᴴ − I‖_F of each matrix, in double precision."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float64))
    return torch.linalg.matrix_norm(x @ x.mH - torch.eye(x.shape[-2], dtype=x.dtype))


def close(a, b, tolerance=1e-12):
    """Equal to an absolute tolerance, never vacuously: NaN is unequal, and shapes must agree."""
    a, b = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t.detach().as_subclass(torch.Tensor) for t in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


def variants(kind):
    """Every registered method of a kind, with its defaults and with each value of each option that it lets us tune."""
    cases = {}
    for name in stiefel.available():
        cls = method_class(name)
        if issubclass(cls, kind):
            chosen = [{}, *({key: value} for key, values in cls.tuning.items() for value in values)]
            cases |= {str(stiefel.get(name, **options)): (name, options) for options in chosen}
    return [pytest.param(*case, id=label) for label, case in cases.items()]


every_step = pytest.mark.parametrize(("name", "options"), variants(StepMethod))


every_proxy = pytest.mark.parametrize(("name", "options"), variants(Reparameterization))


def stepped(method, x, displacement, lr, **count):
    """The point that a step method moves to, whether or not it tells which steps it shortened."""
    result = method.step(x, displacement, lr, **count)
    return result[0] if isinstance(result, tuple) else result


class Bare(nn.Module):
    """One parameter without a layer, so that its gradient is whatever a test sets."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


def tube_points(count, p, n, radius, seed=0, fractions=None):
    """Points with ‖XXᵀ − I‖_F a given share of the radius, in random symmetric directions."""
    s = gaussian(count, p, p, seed=seed)
    s = s + s.mT
    share = torch.linspace(0, 1, count, dtype=torch.float64) if fractions is None else fractions
    s = s / torch.linalg.matrix_norm(s, keepdim=True) * (radius * share)[:, None, None]
    values, q = torch.linalg.eigh(torch.eye(p, dtype=torch.float64) + s)
    return (q * values.clamp_min(0).sqrt().unsqueeze(-2)) @ q.mT @ orthonormal(count, p, n, seed=seed + 1)


ORIENTATIONS = {"rows": Layout((3, 8)), "columns": Layout((8, 3)), "square": Layout((4, 4))}
