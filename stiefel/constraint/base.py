"""What a method is, and the one idea of this library: where in a training step it acts.

Weights have to stay on ``{W : W Wᵀ = s² I}`` while an optimizer trains them. A method acts in one of three places:

    forward:  W = φ(V)                Reparameterization   any optimizer trains V, which is free
    loss:     L + λ s² Φ(W/s)         Penalty              any optimizer; λ decides how near the set W comes
    step:     W ← method(W, U)        StepMethod           U is the displacement that a base optimizer would apply
              W ← R_W(−η grad L)      ManifoldMethod       an optimizer made for manifolds does the whole step

The methods of the literature are these three with a choice of φ, Φ or the step. OWN takes the polar factor of V for φ,
ONI and Björck an iteration towards it, trivializations a map from a flat space: the exponential, Cayley's, products of
reflections. Soft orthogonality takes ``Φ = ‖XXᵀ − I‖_F²`` or a relative of it, constraint dissolving a φ and a Φ(V).
Retractions and the projection end each step on the set; landing and POGO step in a direction that leaves the set a
little, and pull the weight back; manifold Muon and SPEL take steps of length lr, whatever the gradient's length.

Methods differ in nothing else. So everything else is written once, and branches on where a method acts, never on its
name: ``attach`` registers the tensors, ``layout`` reads a weight of any shape and scale as matrices, ``optim`` adapts
the optimizer, ``measure`` measures. A method is a frozen dataclass whose fields are its options. It works on batches
``(b, p, n)``, p ≤ n, of matrices that have to have orthonormal rows. Imports ``claim``, ``options``, ``layout``,
``linalg`` and the errors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from stiefel.constraint.claim import Claim
from stiefel.constraint.options import is_count, is_number
from stiefel.errors import LayoutError, OptionError, nearest_names
from stiefel.layout import Layout
from stiefel.linalg import EXACT_DTYPES, nearest_orthonormal, with_determinant

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


Decay = Literal["acts", "rescales", "moves"]


# ReLU halves the mean square of symmetric activations; s² = 2 makes up for it (He et al., ICCV 2015).
RELU_SCALE = math.sqrt(2.0)


@dataclass(frozen=True, kw_only=True)
class Constraint(ABC):
    """A way to keep a weight on, or near, ``{W : W Wᵀ = scale² I}``.

    Every method has these two options; a method's own are the fields it adds.

    Args:
        scale: s of the set, a positive number, ``"relu"`` (√2, which keeps activations alive through ReLU layers), or
            ``"learnable"`` (one factor per output, start 1; reparameterizations with orthonormal rows only).
        group_size: orthonormal rows within groups of that many outputs, instead of over all outputs.
        determinant: 1 or −1, the sign that a square real weight's determinant starts with and keeps (rotations); by
            default it is that of the weight as it was.
        subspace: only the span of the rows matters to the loss: the optimizer sees the gradient's part that turns it,
            G(I − XᵀX), and its steps' (the Grassmann manifold).
    """

    scale: float | str = 1.0
    group_size: int | None = None
    determinant: int | None = None
    subspace: bool = False

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    place: ClassVar[str]  # "forward", "loss", "step" or "none"
    claim: ClassVar[Claim | None] = None
    """How orthogonal the weight stays; None where the method promises nothing."""
    real_only: ClassVar[bool] = False
    """Whether the method takes real weights only, and no complex ones (unitary constraints)."""
    can_learn_scale: ClassVar[bool] = False
    decay: ClassVar[Decay] = "moves"
    """What weight decay does to the weight, which decides where :func:`stiefel.optimizer` turns it off.

    ``"moves"``: decay is normal to the set and can only disturb the weight: always off. ``"rescales"``: decay shortens
    a proxy whose length does not affect the weight: on where the optimizer's decay only multiplies the proxy by a
    factor. ``"acts"``: the weight is not held on a set, and decays as any other does.
    """
    step_length: ClassVar[bool] = False
    """Whether a step is lr long whatever the gradient's size, so that it converges only as lr goes to zero."""
    caveat: ClassVar[str] = ""
    """Why training may stop short of an optimum that the method's set contains; empty where nothing is known."""
    faults: ClassVar[str] = ""
    """Known faults of a baseline that exists to show their effect; reports keep it apart. Empty for all others."""
    thin: ClassVar[bool] = True
    """Whether the method builds no n×n matrix for a p×n weight with p far below n."""
    tuning: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Values of the method's own options that a comparison may try, beside learning rates."""
    comparison: ClassVar[Mapping[str, Any]] = {}
    """Options that a comparison sets by default, so that all methods optimize over the same set."""
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names that comparisons have for the method with certain options."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            if self.scale not in ("relu", "learnable"):
                raise OptionError(f"scale={self.scale!r}: expected a positive number, 'relu' or 'learnable'")
            if self.scale == "learnable" and not self.can_learn_scale:
                raise OptionError(
                    f"{self.name!r} does not support scale='learnable', which needs a reparameterization without gains "
                    "of its own; use a positive number or 'relu', or choose such a reparameterization"
                )
        elif not (is_number(self.scale) and self.scale > 0):
            raise OptionError(f"scale={self.scale!r}: expected a positive number, 'relu' or 'learnable'")
        if self.group_size is not None and not is_count(self.group_size):
            raise OptionError(f"group_size={self.group_size!r}: expected a positive whole number or None")

        if self.determinant not in (None, 1, -1) or isinstance(self.determinant, (bool, float)):
            raise OptionError(f"determinant={self.determinant!r}: expected 1, -1 or None")
        if not isinstance(self.subspace, bool):
            raise OptionError(f"subspace={self.subspace!r}: expected True or False")
        for option, lost in (("determinant", "a determinant's sign"), ("subspace", "rows that span a subspace")):
            if getattr(self, option) and self.claim is None:
                raise OptionError(
                    f"{option}={getattr(self, option)}: {self.name!r} does not keep {lost}, since it keeps the weight "
                    "on no set; leave it out, or use a method that does, such as 'own' or 'retraction'"
                )

    def require_count(self, option: str) -> None:
        """Raise :class:`OptionError` where an option's value is not a whole number of at least 1."""
        value = getattr(self, option)
        if not is_count(value):
            raise OptionError(f"{option}={value!r}: expected a positive whole number")

    def require_one_of(self, option: str, known: Iterable[str]) -> None:
        """Raise :class:`OptionError` where an option's value is not among the names known."""
        value, known = getattr(self, option), list(known)  # a list, because the value may be unhashable
        if value not in known:
            raise OptionError(f"{option}={value!r}: {nearest_names(str(value), known)}")

    @property
    def fixed_scale(self) -> float:
        """The scale as a number: 1 where it is learnable, since the factors then multiply a matrix of scale 1."""
        if isinstance(self.scale, str):
            return RELU_SCALE if self.scale == "relu" else 1.0
        return float(self.scale)

    @property
    def coefficients(self) -> tuple[float, float] | None:
        """(a, b) of one small SGD step, ``ΔW = −lr [a skew(GXᵀ)X + b G(I − XᵀX)]``; None where it is not tangent."""
        return None

    @property
    def feasible(self) -> bool:
        """Whether the weight is on the set, to rounding, after every step."""
        return self.claim is not None and self.claim.bound == 0

    @property
    def lifts(self) -> bool:
        """Whether the optimizer hands its displacement to the method, which then moves the weight itself."""
        return False

    @property
    def moves(self) -> bool:
        """Whether the weight itself is moved along its set in the step, by an optimizer made for that alone."""
        return self.lifts

    @property
    def orthogonal_start(self) -> bool:
        """Whether training starts from an orthogonal weight of this scale, or from the weight as it is."""
        return True

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The precisions and fields of weights that the method can hold."""
        real = self.real_only or self.determinant is not None  # a complex determinant has a phase
        return tuple(d for d in EXACT_DTYPES if not (real and d.is_complex))

    def check(self, layout: Layout) -> None:
        """Raise :class:`LayoutError` where this method cannot hold a weight of that layout."""
        if self.scale == "learnable" and layout.columns:
            raise LayoutError(
                f"scale='learnable' needs orthonormal rows, and {layout} is column-orthonormal: with a factor per "
                "output its columns would not be orthonormal; use a number, or group_size to constrain groups of rows"
            )
        _, p, n = layout.matrix_shape
        if self.determinant is not None and p != n:
            raise LayoutError(f"determinant={self.determinant} needs square matrices, and this weight has {layout}")
        if self.subspace and p == n:
            raise LayoutError(f"subspace=True needs p < n, and this weight has {layout}: its rows span the whole space")

    def nearest(self, points: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, "b p n"]:
        """The point of this method's set nearest to ``points``, where training starts: the polar factor."""
        return nearest_orthonormal(points)

    def closest(self, points: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, "b p n"]:
        """:meth:`nearest`, with the determinant asked for."""
        x = self.nearest(points, layout)
        return x if self.determinant is None else with_determinant(x, points, self.determinant)

    def within(self, vectors: Float[Tensor, "b p n"], layout: Layout) -> Float[Tensor, "b p n"]:
        """The part of vectors in the linear space in which this method's set lies: all of it, but for centred rows."""
        return vectors

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class Control(Constraint):
    """Acts nowhere: an orthogonal start, then the base optimizer alone; the reference of a comparison."""

    place = "none"
    decay = "acts"


class Reparameterization(Constraint):
    """Acts in the forward pass: the weight is a function of a proxy parameter.

    Where the function needs tensors beside the proxy (the start of a trivialization, the gains of rows), :meth:`start`
    returns them by name, and :meth:`forward` receives them as keyword arguments.
    """

    place = "forward"
    can_learn_scale = True

    @abstractmethod
    def forward(
        self, proxy: Float[Tensor, "b p n"], layout: Layout, *args: Any, **parts: Any
    ) -> Float[Tensor, "b p n"]:
        """The constrained matrix of a proxy."""

    def start(self, x: Float[Tensor, "b p n"], layout: Layout) -> tuple[Float[Tensor, "b p n"], dict[str, Tensor]]:
        """The proxy whose weight is X, and what :meth:`forward` needs beside it.

        Returns:
            The proxy, by default X itself, and tensors by name: an ``nn.Parameter`` is trained, any other is kept as a
            buffer. Each becomes a keyword argument of :meth:`forward`.
        """
        return x, {}

    @torch.no_grad()
    def at_identity(
        self, layout: Layout, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> tuple[Float[Tensor, "b p n"], dict[str, Tensor]]:
        """:meth:`start` at the point of the set nearest to the identity."""
        b, p, n = layout.matrix_shape
        identity = torch.eye(p, n, dtype=dtype, device=device).expand(b, p, n)
        return self.start(self.closest(identity, layout), layout)


class StepMethod(Constraint):
    """Acts on the step of any dense first-order optimizer, which gets the tangent part of the gradient.

    At a stationary point of the constrained problem the gradient is normal to the set, not zero. Adam divides it entry
    by entry, and momentum sums it along a path on which the normal space turns: the result is no longer normal, and no
    projection of the step removes it. So the normal part never reaches the optimizer.
    """

    place = "step"
    tangent: ClassVar[bool] = True
    """Whether the base optimizer gets ``P_X(G)``; False for a baseline that was published with the gradient itself."""
    counts: ClassVar[bool] = False
    """Whether :meth:`step` depends on how many steps were taken, which it then gets by the keyword ``taken``."""
    shortens: ClassVar[bool] = False
    """Whether :meth:`step` also returns which matrices' steps it shortened."""
    projects: ClassVar[bool] = False
    """Whether :meth:`step` depends on U through ``P_X(U)`` alone, so that −lr·G may be passed instead of −lr·P_X(G)."""

    @property
    def lifts(self) -> bool:
        """True of every method on the step."""
        return True

    @abstractmethod
    def step(
        self, x: Float[Tensor, "b p n"], displacement: Float[Tensor, "b p n"], lr: float
    ) -> Float[Tensor, "b p n"] | tuple[Float[Tensor, "b p n"], Bool[Tensor, " b"]]:
        """The next point, given where the base optimizer would have moved: X + displacement.

        A method that ``shortens`` steps also returns which matrices' steps it shortened; the report counts them.
        """


class ManifoldMethod(Constraint):
    """Acts on the step through geoopt: the weight becomes a ``geoopt.ManifoldParameter``."""

    place = "step"
    claim = Claim()

    @property
    def moves(self) -> bool:
        """True of every method through geoopt."""
        return True

    @abstractmethod
    def manifold(self, layout: Layout) -> Any:
        """The ``geoopt.Manifold`` of one weight, in the weight's own shape."""
