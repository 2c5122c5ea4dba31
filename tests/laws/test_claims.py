"""Every claim of the catalogue at the sizes that layers have, from the starts and under the gradients that are hardest.

    ‖XXᵀ − I‖_F ≤ bound + 64 ε √p   after every step, for rates within the claim

A claim holds for gradients of unit norm, at its largest rate, under every optimizer that the method can have. What
bends a proxy out of shape is a gradient of rank one that stays the same, and an ill-conditioned start. All weights of a
shape are trained at once. The default part takes two optimizers and few steps; all sizes and precisions: ``-m slow``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import conformance
import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.constraint import Claim, Constraint, Reparameterization
from stiefel.layout import Layout
from stiefel.linalg import EXACT_DTYPES, newton_schulz

CLAIMED = conformance.claimed()
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
}
CONDITIONS = (None, 1e1, 1e2, 1e3, 1e4)
"""Of the start, from Gaussian entries and from singular values that are even in the logarithm."""
LONGEST = 1e3
"""The rate at which a claim for all rates is tested."""
N_LARGEST = 1000
"""Columns up to which methods that build n×n matrices are tested, by the slow part; by the quick one up to a tenth."""

STEPS = {(5, 5): 200, (64, 64): 100, (64, 576): 60, (128, 128): 60, (256, 256): 25, (512, 4608): 2}
QUICK = {(5, 5): 40, (64, 64): 15, (64, 576): 5}


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start(shape: tuple[int, int], condition: float | None, dtype: torch.dtype, seed: int) -> Tensor:
    """A matrix with that condition number, as large as an orthonormal one."""
    v = gaussian(shape, torch.promote_types(dtype, torch.float64), seed)
    if condition is not None:
        u, s, vh = torch.linalg.svd(v, full_matrices=False)
        v = (u * torch.logspace(0, -math.log10(condition), len(s), dtype=s.dtype)) @ vh
    return (v * shape[0] ** 0.5 / torch.linalg.matrix_norm(v)).to(dtype)


def gradient(shape: tuple[int, int], rank_one: bool, dtype: torch.dtype, seed: int, step: int) -> Tensor:
    """A dense one is new at every step; one of rank one stays, so that what it does to a proxy adds up."""
    if rank_one:
        return gaussian((shape[0], 1), dtype, seed) @ gaussian((1, shape[1]), dtype, seed + 1)
    return gaussian(shape, dtype, 1000 * (step + 1) + seed)


@dataclass
class Trained:
    """One of the weights that are trained at once."""

    weight: ConstrainedWeight
    condition: float | None
    rank_one: bool
    seed: int

    def pull(self, step: int) -> Tensor:
        w = getattr(self.weight.owner, self.weight.tensor)
        g = gradient(tuple(w.shape), self.rank_one, w.dtype, self.seed, step).to(w.device)
        return (w * g.conj()).real.sum()

    def __str__(self) -> str:
        condition = "random start" if self.condition is None else f"start of condition {self.condition:.0e}"
        return f"{condition}, gradients of rank {'one' if self.rank_one else 'p'}"


def trained_at_once(
    method: Constraint, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[nn.Module, list[Trained]]:
    """A module of a weight for each start and kind of gradient; an ill-conditioned start is one of the proxy."""
    conditions = CONDITIONS if shape[0] < 256 else CONDITIONS[::2]
    cases = [(condition, rank_one) for condition in conditions for rank_one in (False, True)]
    model = nn.Module()
    for seed, (condition, _) in enumerate(cases):
        model.register_parameter(f"w{seed}", nn.Parameter(start(shape, condition, dtype, seed).to(device)))
    stiefel.constrain(model, method, layers=[f"w{seed}" for seed in range(len(cases))])
    found = []
    for seed, (weight, (condition, rank_one)) in enumerate(zip(constrained_weights(model), cases, strict=True)):
        if isinstance(method, Reparameterization) and condition is not None:
            with torch.no_grad():
                weight.parameter.copy_(start(shape, condition, dtype, seed))
        found.append(Trained(weight, condition, rank_one, seed))
    return model, found


def violations(
    method: Constraint, shape: tuple[int, int], dtype: torch.dtype, name: str, count: int, device: str = "cpu"
) -> dict[str, float] | None:
    """Residuals beyond the claim by where they occurred; None where the method cannot have that optimizer."""
    assert method.claim is not None
    kind, hyper = OPTIMIZERS[name]
    if method.claim.optimizers and kind.__name__ not in method.claim.optimizers:
        return None
    model, found = trained_at_once(method, shape, dtype, device)
    try:
        optimizer: Any = stiefel.optimizer(model, kind, lr=min(method.claim.rates[1], LONGEST), **hyper)
    except stiefel.OptimizerError:
        return None
    off: dict[str, float] = {}
    for step in range(count):
        torch.default_generator.manual_seed(step)
        optimizer.zero_grad()
        torch.stack([t.pull(step) for t in found]).sum().backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= torch.linalg.vector_norm(p.grad).clamp_min(1e-30)
        optimizer.step()
        if step < 2 or step % 10 == 9 or step == count - 1:
            for t in found:
                residual = t.weight.residual()
                if not t.weight.allows(residual):
                    off.setdefault(f"{name}, {t}, step {step}", residual)
    return off


def check(
    method: Constraint,
    shape: tuple[int, int],
    dtype: torch.dtype,
    names: list[str],
    count: int,
    device: str = "cpu",
) -> None:
    found = [violations(method, shape, dtype, name, count, device) for name in names]
    assert any(f is not None for f in found), "no optimizer was tried"
    off = {where: residual for f in found if f is not None for where, residual in f.items()}
    assert not off, f"{method} is off its claim: " + "; ".join(f"{r:.0e} ({w})" for w, r in off.items())


def cases(shapes: list[tuple[int, int]], dtypes: list[torch.dtype], n_largest: int) -> list[Any]:
    return [
        pytest.param(method, shape, dtype, id=f"{method}-{shape[0]}x{shape[1]}-{str(dtype).removeprefix('torch.')}")
        for method in CLAIMED
        for shape in shapes
        for dtype in method.dtypes
        if dtype in dtypes and (method.thin or shape[1] <= n_largest)
    ]


@dataclass(frozen=True, kw_only=True)
class TooFewSteps(Reparameterization):
    """Newton-Schulz from a bound on the norm, as often as is enough at the start."""

    name = "test_too_few_steps"
    summary = "twelve Newton-Schulz steps"
    reference = "none"
    claim = Claim(rates=(0, 0.1))

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        x = proxy / torch.linalg.matrix_norm(proxy @ proxy.mH, keepdim=True).sqrt()
        for _ in range(12):
            x = newton_schulz(x)
        return x


def test_a_claim_of_too_few_steps_is_found_out() -> None:
    check(TooFewSteps(), (5, 5), torch.float32, ["AdamW"], 0)  # fit to be tested
    off = violations(TooFewSteps(), (64, 64), torch.float32, "AdamW", 15)
    assert off is not None
    assert any("random start" not in where for where in off)


@pytest.mark.sampled(10)
@pytest.mark.parametrize(
    ("method", "shape", "dtype"),
    cases(list(QUICK), [torch.float32], N_LARGEST // 10) + cases([(5, 5)], [torch.float64, torch.complex64], N_LARGEST),
)
def test_claims(method: Constraint, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(method, shape, dtype, ["momentum", "AdamW"], QUICK[shape])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("method", "shape", "dtype"), cases(list(STEPS), list(EXACT_DTYPES), N_LARGEST))
def test_claims_at_length(method: Constraint, shape: tuple[int, int], dtype: torch.dtype, optimizer: str) -> None:
    off = violations(method, shape, dtype, optimizer, STEPS[shape])
    if off is None:
        pytest.skip("an optimizer that the method cannot have")
    assert not off, "; ".join(f"{r:.0e} ({w})" for w, r in off.items())
