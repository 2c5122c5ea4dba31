"""The state of a whitening layer: running mean and covariance, and the matrix that is made of these in ``eval()``.

Imports ``linalg``, ``compat`` and the errors.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from stiefel.compat.torch_private import Convertible
from stiefel.errors import BatchError
from stiefel.linalg import EXACT_DTYPES, is_traced, state_of, whitening_of


class RunningCovariance(Convertible):
    """Averages of the means and covariances of batches, and the whitening matrix of the average covariance.

    It is the covariance that is averaged, not the matrix: the average of inverse roots is not the inverse root of the
    average (by Jensen's inequality it is larger), a PCA's axes change places from batch to batch, and what is averaged
    linearly may be averaged again, as over weights or processes.

    Args:
        groups, group_size: of features that are whitened together.
        kind, eps, iterations: of the matrix (:func:`stiefel.linalg.whitening_of`).
        momentum: weight of the newest batch; None: all batches alike.
        track: whether there are averages at all.
        made: device and dtype.
    """

    running_mean: Tensor | None
    running_cov: Tensor | None
    num_batches_tracked: Tensor | None
    matrix: Tensor | None

    def __init__(
        self,
        groups: int,
        group_size: int,
        kind: str,
        eps: float,
        iterations: int,
        momentum: float | None,
        track: bool,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        self.groups, self.group_size, self.kind = groups, group_size, kind
        self.eps, self.iterations, self.momentum, self.track_running_stats = eps, iterations, momentum, track
        size = (groups, group_size, group_size)
        self.register_buffer("running_mean", torch.empty(groups * group_size, **made) if track else None)
        self.register_buffer("running_cov", torch.empty(size, **made) if track else None)
        count = torch.zeros((), dtype=torch.long, device=made["device"]) if track else None
        self.register_buffer("num_batches_tracked", count)
        # Made in eval(), where compilers and exporters find it.
        self.register_buffer("matrix", None, persistent=False)
        self._made_of: tuple[Tensor | None, tuple[Any, ...] | None] = (None, None)
        """The layer's own covariance, and the state of it that the matrix was made of."""
        self.register_load_state_dict_post_hook(_after_loading)

    def reset_running_stats(self) -> None:
        """Mean 0, covariance I, no batch seen."""
        if self.running_mean is not None and self.running_cov is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_cov.copy_(torch.eye(self.group_size))
            self.num_batches_tracked.zero_()
            self.refresh()

    def train(self, mode: bool = True) -> Self:
        """As :meth:`torch.nn.Module.train`; ``eval()`` makes the matrix of the running covariance."""
        super().train(mode)
        self.refresh()
        return self

    @torch.no_grad()
    def track(self, mean: Tensor, covariance: Tensor, count: int) -> None:
        """Take a batch of so many samples into the averages; its covariance made unbiased, as torch's BatchNorm."""
        assert self.running_mean is not None
        assert self.running_cov is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: float | Tensor | None = self.momentum
        if share is None:  # a tensor: no host should wait for the count
            share = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        self.running_mean.lerp_(mean.flatten().to(self.running_mean), share)
        self.running_cov.lerp_((covariance * (count / (count - 1))).to(self.running_cov), share)

    def current_matrix(self) -> Tensor:
        """The whitening matrix of the running covariance, which is computed once while nothing changes.

        That of another covariance, put in the place of the layer's own by ``torch.func.functional_call``, is not kept.
        """
        assert self.running_cov is not None
        # A compiler does not see what else is written to the covariance: it takes the matrix as eval() left it.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            if self.matrix is None or self.matrix.dtype != self.running_cov.dtype:
                return self._computed()
            return self.matrix
        own, state = self._made_of
        if own is not self.running_cov:
            return self._computed()
        if self.matrix is None or state != self._state():
            if is_traced():
                return self._computed()
            self.refresh()
        return self._computed() if self.matrix is None else self.matrix

    def refresh(self) -> None:
        """Make the matrix anew in ``eval()``; drop it in ``train()``."""
        self.matrix, self._made_of = None, (self.running_cov, None)
        if self.training or self.running_cov is None or self.running_cov.is_meta:
            return
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a gradient
            self.matrix, self._made_of = self._computed(), (self.running_cov, self._state())

    def after_conversion(self) -> None:
        """Take the tensors that the layer has now for its own; the matrix is made anew when it is next used."""
        self._made_of = (self.running_cov, None)

    def _computed(self) -> Tensor:
        assert self.running_cov is not None
        self.check_dtype()
        return whitening_of(self.running_cov, self.kind, self.eps, self.iterations).to(self.running_cov)

    def _state(self) -> tuple[Any, ...]:
        """What the matrix depends on."""
        assert self.running_cov is not None
        return *state_of(self.running_cov), self.kind, self.eps, self.iterations

    def check_dtype(self) -> None:
        """Refuse running statistics in half precision."""
        if self.running_cov is not None and self.running_cov.dtype not in EXACT_DTYPES:
            raise BatchError(
                f"the running covariance is {self.running_cov.dtype}, which has too few digits for its inverse root; "
                "keep the layer in float32 (layer.float()): it takes batches of any precision"
            )


def _after_loading(layer: RunningCovariance, _: Any) -> None:
    layer.refresh()
