"""The Stiefel manifold as a geoopt manifold, over weights in their own shape. Imports ``geometry``, ``layout``, geoopt.

Replaces geoopt 0.5.1's canonical Stiefel manifold, in which ``retr`` moves along u + u·XᵀX instead of u, ``proju``
doubles the part of u in the span of X, so that it is no projection and ``stabilize`` with momentum diverges, and every
solve is n×n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stiefel.compat.geoopt import geoopt
from stiefel.layout import Layout
from stiefel.linalg import full_precision, gram_residual, nearest_orthonormal, project_horizontal
from stiefel.manifold import geometry, retractions

_EXP = {"euclidean": retractions.exp_euclidean, "canonical": retractions.exp_canonical}
_GRADIENT = {"euclidean": geometry.euclidean_gradient, "canonical": geometry.canonical_gradient}


class StiefelWeight(geoopt.Stiefel):
    """``{W : W Wᵀ = s² I}`` for a weight of any layout, with a metric and a retraction.

    The first methods are formulas on points ``(b, p, n)``. The others are geoopt's interface on weights: they divide
    points and displacements by the scale, and gradients not, so that a learning rate means the same at every scale.

    Args:
        layout: how the weight is read.
        metric: ``"euclidean"`` or ``"canonical"``.
        retraction: a function of the point and a tangent, on ``(b, p, n)``, such as :func:`retractions.retract_qr`.
        subspace: whether only the rows' span matters: gradients and tangents are horizontal.
    """

    name = "StiefelWeight"
    reversible = False
    binding: Any  # the weight's Binding, set when the weight is put on the manifold

    def __new__(cls, *args: Any, **kwargs: Any) -> StiefelWeight:
        return geoopt.Manifold.__new__(cls)  # geoopt's own __new__ takes `canonical` and nothing else

    def __init__(
        self,
        layout: Layout,
        metric: str = "euclidean",
        retraction: Callable[[Tensor, Tensor], Tensor] = retractions.retract_qr,
        subspace: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.metric, self.retraction, self.subspace = layout, metric, retraction, subspace
        self.ndim = len(layout.shape)  # what geoopt takes as one point: the whole weight

    # --- on points (b, p, n) ---

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Riemannian gradient of the metric; 0 where it is no more than rounding, which Adam would normalize."""
        # Both metrics' gradients have the same horizontal part.
        gradient = project_horizontal if self.subspace else _GRADIENT[self.metric]
        return geometry.without_rounding(gradient(x, g), g)

    def tangent(self, x: Tensor, u: Tensor) -> Tensor:
        """The part of U along which points are moved from X."""
        return geometry.project_tangent(x, u, horizontal=self.subspace)

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """Move from X along the tangent U and stay on the manifold."""
        return self.retraction(x, u)

    def inner_points(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product of the metric, one number per matrix."""
        if self.metric == "canonical":
            return geometry.canonical_inner(x, u, v)
        return geometry.euclidean_inner(u, v)

    # --- geoopt's interface, on weights in their own shape ---

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        # geoopt's optimizers call these inside a training step, where autocast or TF32 may be on.
        with full_precision(x.device):
            return self.layout.weight(self.retract(self.layout.points(x), self.layout.points(u)))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        with full_precision(x.device):
            return self.layout.weight(_EXP[self.metric](self.layout.points(x), self.layout.points(u)))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        with full_precision(x.device):
            return self.layout.tensor(self.gradient(self.layout.points(x), self.layout.matrices(u)))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        with full_precision(x.device):
            return self.layout.tensor(self.tangent(self.layout.points(x), self.layout.matrices(u)))

    def projx(self, x: Tensor) -> Tensor:
        # Computed in double, which autocast and TF32 leave alone: no context is needed.
        return self.layout.weight(nearest_orthonormal(self.layout.points(x)))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Vector transport by projection (Absil, Mahony and Sepulchre 2008, section 8.1.3)."""
        return self.proju(y, v)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product, summed over the weight's matrices: the manifold of b matrices is a product manifold."""
        v = u if v is None else v
        value = self.inner_points(self.layout.points(x), self.layout.matrices(u), self.layout.matrices(v)).sum()
        return value.reshape([1] * self.ndim) if keepdim else value

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """``⟨U, V⟩/(pn)`` of each matrix, in every entry of it: Adam's second moment.

        geoopt leaves out the division, so its Adam moves a p×n matrix by lr where torch's moves it by lr·√(pn).
        """
        v = u if v is None else v
        _, p, n = self.layout.matrix_shape
        mean = self.inner_points(self.layout.points(x), self.layout.matrices(u), self.layout.matrices(v)) / (p * n)
        return self.layout.tensor(mean[:, None, None].expand(self.layout.matrix_shape))

    def random(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
        """A weight drawn uniformly; ``generator=`` makes it reproducible."""
        generator = kwargs.pop("generator", None) or torch.default_generator
        # Drawn where the generator is, torch's default one on the CPU, and then moved.
        points = geometry.random_stiefel(
            *self.layout.matrix_shape, generator=generator, dtype=dtype or torch.float32, device=generator.device
        )
        return geoopt.ManifoldTensor(self.layout.weight(points).to(device=device), manifold=self)

    random_naive = random

    def origin(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, seed: int | None = 42) -> Tensor:
        """The weight whose matrices are the identity's first p rows."""
        b, p, n = self.layout.matrix_shape
        points = torch.eye(p, n, dtype=dtype, device=device).expand(b, p, n)
        return geoopt.ManifoldTensor(self.layout.weight(points), manifold=self)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if tuple(shape) != self.layout.shape:
            return False, f"`{name}` should have the shape {self.layout.shape} of the weight, got {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        residual = gram_residual(self.layout.points(x)).abs().max().item()
        return (
            (True, None) if residual <= atol + rtol else (False, f"`W Wᵀ/s² − I` has an entry of size {residual:.2e}")
        )

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        normal = geometry.sym(self.layout.points(u) @ self.layout.points(x).mT).abs().max().item()
        return (True, None) if normal <= atol + rtol else (False, f"`sym(U Wᵀ)` has an entry of size {normal:.2e}")

    def extra_repr(self) -> str:
        return f"{self.layout}, scale={self.layout.scale:g}, metric={self.metric}, {self.retraction.__name__}"
