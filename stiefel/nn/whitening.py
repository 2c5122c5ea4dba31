"""Layers whose outputs are uncorrelated over a batch: batch normalization extended to whitening.

Imports ``nn``, ``linalg`` and the errors.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stiefel.linalg import WHITENINGS, affine_map, full_precision, is_traced, whitened_batch
from stiefel.nn.running import RunningCovariance
from stiefel.nn.shapes import check_number, check_options, check_shape, number_of_groups, pooled, unpooled

__all__ = ["Whitening1d", "Whitening2d"]


class _Whitening(RunningCovariance):
    """What :class:`Whitening1d` and :class:`Whitening2d` share; they differ in the shapes that they take."""

    shapes: ClassVar[dict[int, str]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        groups: int | None = None,
        group_size: int | None = None,
        kind: str = "zca",
        iterations: int = 5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_options(num_features, eps, momentum, kind, iterations, WHITENINGS)
        groups = number_of_groups(num_features, groups, group_size)
        made = {"device": device, "dtype": dtype}
        size = num_features // groups
        super().__init__(groups, size, kind, eps, iterations, momentum, track_running_stats, made)
        self.num_features, self.affine = num_features, affine
        self.weight = nn.Parameter(torch.empty(num_features, **made)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_features, **made)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights 1, biases 0, and :meth:`reset_running_stats`."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Whiten over the batch; in ``eval()``, apply the affine map of the running statistics."""
        check_shape(x, type(self).__name__, self.shapes, self.num_features)
        self.check_dtype()
        samples, in_rows = pooled(x.to(torch.promote_types(x.dtype, torch.float32)), self.groups)
        by_batch = self.training or not self.track_running_stats
        y = self._of_batch(samples) if by_batch else self._of_running_statistics(samples)
        return unpooled(y, x, in_rows).to(x.dtype)

    def _of_batch(self, samples: Tensor) -> Tensor:
        count = samples.shape[-1]
        # Newton's iteration leaves small variances small: it needs no full rank.
        check_number(count, self.num_features, self.group_size, 2 if self.kind == "newton" else self.group_size + 1)
        weight, bias = self._by_group(self.weight), self._by_group(self.bias)
        tracked = self.training and self.track_running_stats
        found = whitened_batch(
            samples, weight, bias, kind=self.kind, eps=self.eps, iterations=self.iterations, statistics=tracked
        )
        if tracked and found.mean is not None and found.covariance is not None:  # in a graph they always come
            self.track(found.mean, found.covariance, count)
        return found.y

    def _of_running_statistics(self, samples: Tensor) -> Tensor:
        matrix, mean = self.current_matrix(), self._by_group(self.running_mean)
        weight, bias = self._by_group(self.weight), self._by_group(self.bias)
        assert mean is not None
        # An exporter would write the context into its program, where plain products are asked for.
        plain = is_traced() and not torch.is_autocast_enabled(samples.device.type)
        with nullcontext() if plain else full_precision(samples.device):
            matrix = matrix if weight is None else weight * matrix
            constant = torch.zeros_like(mean) if bias is None else bias
            # Centred first: where the mean is far from 0, W x and W μ would lose their digits to each other.
            return affine_map(matrix.to(samples.dtype), samples - mean.to(samples.dtype), constant.to(samples.dtype))

    def _by_group(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values.view(self.groups, self.group_size, 1)

    def extra_repr(self) -> str:
        """The arguments."""
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
        text += f"track_running_stats={self.track_running_stats}, groups={self.groups}, kind={self.kind!r}"
        return text + (f", iterations={self.iterations}" if self.kind == "newton" else "")


class Whitening1d(_Whitening):
    """``y = γ (Σ + eps I)^{-1/2} (x − μ) + β`` over a batch: outputs of mean 0, variance 1 and no correlations.

        layer = stiefel.nn.Whitening1d(64, group_size=16)

    μ and Σ are mean and covariance of the batch, over N (and L), of each group of features by itself; groups of one
    feature are torch's BatchNorm. The gradient goes through both. It is exact and finite, also where eigenvalues of Σ
    repeat, where autograd through an eigendecomposition returns NaN, and so are higher derivatives.

    In ``eval()`` the layer is an affine map made of running averages of μ and Σ, which compilers and exporters take as
    two buffers. Under DistributedDataParallel each process whitens its own part of a batch, and the running statistics
    are those of process 0, as with torch's BatchNorm.

    Args:
        num_features: C, of a batch (N, C) or (N, C, L) in any real precision. The output has its dtype; inside,
            autocast and reduced products are off.
        eps: added to the variances. Directions with less variance than that stay small.
        momentum: weight of the newest batch in the running statistics; None: the plain average of all batches.
        affine: learn γ (start 1) and β (start 0), one per feature.
        track_running_stats: keep running statistics. Otherwise ``eval()`` whitens over the batch too.
        groups, group_size: the number of groups of features, or their size; default one group of all. A batch needs
            more samples than a group has features, and some times as many for a covariance that is not mostly noise.
        kind: ``"zca"``: the symmetric inverse root, of all whitenings the one that changes activations least.
            ``"pca"``: ``Λ^{-1/2} Dᵀ`` of ``Σ = D Λ Dᵀ``, for comparison: its axes change places from batch to batch;
            differentiable once. ``"newton"``: a few of Newton's iterations towards ZCA's, which leave small variances
            small.
        iterations: of ``"newton"``.
        device, dtype: of parameters and running statistics; float32 or float64.

    Raises:
        OptionError: a value that its option does not have.
        BatchError: a batch of another shape, of too few samples, or that is not finite.

    Source: Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, CVPR 2018 (arXiv 1804.08450); ``"newton"``:
    Huang, Zhou, Zhu, Liu and Shao, Iterative Normalization, CVPR 2019 (arXiv 1904.03441).
    """

    shapes: ClassVar[dict[int, str]] = {2: "(N, C)", 3: "(N, C, L)"}


class Whitening2d(_Whitening):
    """:class:`Whitening1d` for images (N, C, H, W): each pixel is a sample of C features.

        layer = stiefel.nn.Whitening2d(64, group_size=16)

    Args:
        num_features: C; all others as for :class:`Whitening1d`.

    Raises:
        As :class:`Whitening1d`.

    Source: as for :class:`Whitening1d`.
    """

    shapes: ClassVar[dict[int, str]] = {4: "(N, C, H, W)"}
