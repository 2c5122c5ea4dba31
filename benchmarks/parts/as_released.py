"""The paper's baselines with their faults, as published and as the code released with it has them; imported for names.

``qr_projection`` is the published QR baseline. The others are read from github.com/huangleiBuaa/OthogonalWN
(``module/Linear_Weight_{ST,ST_CN,CayT,QR,DBN_Row_Group,PCA_Row}.lua`` and ``models/MLP/model_WN_debug.lua``). In each
layer of its Riemannian baselines

- ``gradPWeight`` is added to in every step and zeroed in none: the step uses the sum of all gradients so far;
- the start is uniform in ±1/√fan-in, off the set until the first QR factor is taken;
- the learning rate is the one at construction: a schedule does not reach it.

Its square matrices have orthonormal columns where the package's have orthonormal rows: the same set, but other formulas
off it, and other QR factors. Biases and the last layer train as everywhere. Its runs were at scale 1 only; here the
sum, the start and the step are in units of X = W/s at other scales.

A baseline of that code is the memory of one model: make a new one for each, and step it with plain SGD.

Its own methods, OLM and OLM_var, have no fault of that kind: their gradients are zeroed, their rate follows the
schedule. What they have is in :class:`Proxy`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from stiefel import StepMethod, register
from stiefel.constraint import Claim, Reparameterization
from stiefel.layout import Layout
from stiefel.linalg import cayley_step, nearest_orthonormal, polar, qf, sym, whitened


@register
@dataclass(frozen=True, kw_only=True)
class QRProjection(StepMethod):
    """``X ← qf(X + U)``, whatever U is: the paper's QR baseline as it is published, right otherwise.

    To first order it moves along ``G(I − XᵀX) + (T − Tᵀ)X``, T the strict upper triangle of GXᵀ, where the gradient has
    ``skew(GXᵀ)X``.
    """

    name = "qr_projection"
    summary = "QR factor after each step"
    reference = "Huang et al., AAAI 2018"
    claim = Claim()
    faults = "its step does not follow a gradient, and can go uphill"
    tangent: ClassVar[bool] = False

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """The factor of where the optimizer would have gone."""
        return qf(x + displacement)


@dataclass(frozen=True, kw_only=True)
class AsReleased(StepMethod):
    """``S ← S + G``, then a step from X along S at the first learning rate; of plain SGD, ``G = −U/lr``."""

    reference = "Huang et al., AAAI 2018, released code"
    faults = "adds up all gradients, starts off the set, and keeps its first learning rate"
    tangent: ClassVar[bool] = False

    @cached_property
    def sums(self) -> dict[torch.Size, Tensor]:
        """S of the weights of each shape, which are stepped together."""
        return {}

    @cached_property
    def rates(self) -> list[float]:
        """The learning rate of the first step, once that is taken."""
        return []

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        """Not the nearest point: a new one, in general on no set at all."""
        return _uniform(points, layout)

    def step(self, x: Tensor, displacement: Tensor, lr: float) -> Tensor:
        """Add up the gradient, and step along the sum, as columns."""
        if not self.rates:
            self.rates.append(lr)
        total = self.sums[x.shape] = self.sums.get(x.shape, 0) - displacement / lr
        if _square(x):
            return self.move(x, total, self.rates[0])
        return self.move(x.mT, total.mT, self.rates[0]).mT

    @abstractmethod
    def move(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        """The step of ``(b, n, p)`` matrices W with orthonormal columns, where the gradient is G."""


def _uniform(like: Tensor, layout: Layout) -> Tensor:
    """Entries uniform in ±1/√fan-in, which is torch's start too."""
    return torch.empty_like(like).uniform_(-1, 1) / layout.fan_in**0.5


def _square(x: Tensor) -> bool:
    return x.shape[-2] == x.shape[-1]


def _q(w: Tensor) -> Tensor:
    """Q of the QR factorization with R's diagonal positive."""
    return qf(w.mT).mT


@register
@dataclass(frozen=True, kw_only=True)
class EIQR(AsReleased):
    """``W ← qf(W − lr (G − W sym(WᵀG)))``, G the sum."""

    name = "ei_qr_as_released"
    summary = "gradient in the Euclidean metric, QR; sum of gradients, frozen rate"

    def move(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        """The step."""
        return _q(w - lr * (g - w @ sym(w.mT @ g)))


@register
@dataclass(frozen=True, kw_only=True)
class CIQR(AsReleased):
    """``W ← qf(W − lr (G − W GᵀW))``, G the sum."""

    name = "ci_qr_as_released"
    summary = "gradient in the canonical metric, QR; sum of gradients, frozen rate"

    def move(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        """The step."""
        return _q(w - lr * (g - w @ (g.mT @ w)))


@register
@dataclass(frozen=True, kw_only=True)
class QR(AsReleased):
    """``W ← qf(W − lr G)``, G the sum."""

    name = "qr_as_released"
    summary = "QR factor after each step; sum of gradients, frozen rate"

    def move(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        """The step."""
        return _q(w - lr * g)


@register
@dataclass(frozen=True, kw_only=True)
class CayT(EIQR):
    """The Cayley transform ``W ← (I + lr/2 A)⁻¹ (I − lr/2 A) W``, ``A = GWᵀ − WGᵀ``, in the first layer; else EI+QR.

    The first layer is here the one that is not square. It starts on the set, which the transform could not reach.
    """

    name = "cayt_as_released"
    summary = "Cayley transform in the first layer, EI+QR in the others; sum of gradients, frozen rate"

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        """The common start for the first layer; a new point off the set for the others."""
        return super().nearest(points, layout) if _square(points) else nearest_orthonormal(points)

    def move(self, w: Tensor, g: Tensor, lr: float) -> Tensor:
        """The step of either kind of layer."""
        return super().move(w, g, lr) if _square(w) else cayley_step(w.mT, -lr * g.mT).mT


@dataclass(frozen=True, kw_only=True)
class Proxy(Reparameterization):
    """``V_c = V − (1/n) V 1 1ᵀ``, and X a function of V_c and ``Σ = V_c V_cᵀ/n + εI``, ``ε = 1e-7``.

    As in that code: V_c is always centred, so that a square layer has rank n − 1 and one singular value 0, and is not
    orthogonal; V starts uniform; layers have no bias; rows are orthonormal in groups of at most ``rows``, or of as many
    as a row has entries. There a last group may be smaller; here all are of one size (64 inputs and 100 outputs: two
    of 50, where that code has 64 and 36).

    ``(V_c V_cᵀ + nεI)^{-1/2} V_c`` is the part of the polar factor of ``[V_c, √(nε) I]`` that belongs to V_c, and so
    for singular vectors: its gradient is that of :func:`stiefel.linalg.polar` and needs no gaps between eigenvalues.
    """

    reference = "Huang et al., AAAI 2018, released code"
    decay = "rescales"
    real_only = True

    rows: ClassVar[int] = 256
    """Most rows of a group."""
    eps: ClassVar[float] = 1e-7

    def nearest(self, points: Tensor, layout: Layout) -> Tensor:
        """Not the nearest point: a new proxy."""
        return _uniform(points, layout)

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        """Centre and orthonormalize."""
        p, n = proxy.shape[-2:]
        centred = proxy - proxy.mean(-1, keepdim=True)
        floor = (n * self.eps) ** 0.5 * torch.eye(p, dtype=proxy.dtype, device=proxy.device).expand(len(proxy), p, p)
        return self.orthonormalized(torch.cat([centred, floor], -1))[..., :n]

    @abstractmethod
    def orthonormalized(self, v: Tensor) -> Tensor:
        """Orthonormal rows of V."""


@register
@dataclass(frozen=True, kw_only=True)
class OLM(Proxy):
    """``X = Σ^{-1/2} V_c/√n``."""

    name = "olm_as_released"
    summary = "OWN with centred rows, no bias, uniform start"
    faults = "always centres, so that a square layer is not orthogonal, and has no bias where others have one"

    def orthonormalized(self, v: Tensor) -> Tensor:
        """The polar factor."""
        return polar(v)


@register
@dataclass(frozen=True, kw_only=True)
class OLMVar(Proxy):
    """``X = Λ^{-1/2} Dᵀ V_c/√n``, ``Σ = D Λ Dᵀ``, eigenvalues descending. Its signs are whatever the library gave."""

    name = "olm_var_as_released"
    summary = "PCA instead of ZCA whitening of the proxy; centred rows, no bias, uniform start"
    faults = "as olm_as_released; the weight jumps where eigenvalues cross"

    def orthonormalized(self, v: Tensor) -> Tensor:
        """The right singular vectors."""
        return whitened(v).flip(-2)
