"""Why to normalize: how well conditioned the inputs of layers are, and the Fisher blocks of their weights.

Imports ``taps``, ``moments`` and ``spectrum``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.errors import OptionError
from stiefel.linalg import in_double
from stiefel.measure.model.moments import Moments, gradient_rows, input_rows
from stiefel.measure.model.spectrum import EXACT_TO, Spectrum, kronecker, union
from stiefel.measure.model.taps import UNCALLED, UNREACHED, Place, Taps, linear_maps


@dataclass(frozen=True)
class Conditioning:
    """The spectra that decide how fast gradient descent on one layer's weight converges.

        F = Σ_n (h_n h_nᴴ) ⊗ (g_n g_nᴴ) ≈ A ⊗ S,    A = E[h hᴴ],    S = Σ_n g_n g_nᴴ,

    with h what an output y = W h of the layer is a product with, g = ∂L/∂y, and the sum over examples and positions.
    A convolution's h is the window that its kernel meets, padding included; a transposed one's is a pixel, and its g
    the window of ∂L/∂y. Groups make F block diagonal; its spectrum is that of all blocks. The approximation takes h and
    g as independent, and examples as not seeing each other, which batch normalization in training mode breaks.

    ``inputs`` is the spectrum of A, ``gradients`` that of S, ``block`` that of A ⊗ S, whose condition number is
    κ(A) κ(S). ``rows`` is how many h were taken: A's rank is not above it. What was not measured is None, with the
    ``reason``.
    """

    inputs: Spectrum | None
    gradients: Spectrum | None
    block: Spectrum | None
    rows: int
    reason: str | None = None


def conditioning(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    centred: bool = False,
    unconstrained: bool = False,
    per_entry: int | None = None,
    exact_to: int = EXACT_TO,
) -> dict[str, Conditioning]:
    """Spectrum and condition number of each layer's input second moment and of its Kronecker-factored Fisher block.

    ``conditioning(model, lambda: F.cross_entropy(model(x), y))``: S at the labels of the loss, the *empirical* Fisher
    matrix; Fisher's own with labels that ``run`` draws from the model's prediction.
    ``conditioning(model, lambda: model(x), loss=lambda z: F.cross_entropy(z, y))``: S of the *Gauss-Newton* matrix
    Jᴴ H J, with H_n = R_n R_nᵀ the loss's Hessian in an example's outputs, by a backward pass per column of R.

    Gradients of parameters are neither computed nor changed.

    Args:
        model: whose Linear, Conv1-3d and ConvTranspose1-3d with a constrained weight are measured.
        run: calls the model on a batch and returns the loss, a number; with ``loss`` the outputs, (examples, …).
            Without a graph, only inputs are measured.
        loss: of the outputs, a sum or a mean over examples, convex.
        centred: whether A is the covariance E[h hᴴ] − E[h] E[h]ᴴ: what remains of the block of weight and bias once the
            bias is at its optimum (its Schur complement). By default the mean stays, as it does in F.
        unconstrained: whether layers without a constraint are measured too.
        per_entry: how many h of each call are taken for each entry of h, likewise g; but 2,048 at least, from evenly
            spread places. All by default.
        exact_to: rows of a matrix up to which all its eigenvalues are computed.

    Returns:
        By the weights' names, in the order of their first calls, layers that were not seen last.

    Raises:
        OptionError: ``run`` returned neither, or ``loss`` is not convex in the outputs.

    Source: LeCun, Kanter and Solla, NIPS 1990 (E[h hᵀ] and its mean); Martens and Grosse, ICML 2015 (K-FAC); Grosse and
    Martens, ICML 2016 (convolutions); Botev, Ritter and Barber, ICML 2017 (columns of R).
    """
    layers, others = linear_maps(model, unconstrained=unconstrained)
    seen = _Factors(per_entry, centred)
    with Taps(layers, seen.see) as taps:
        _differentiate(run(), loss, taps)
    found = {name: seen.conditioning(name, exact_to) for name in seen.inputs}
    missing = {name: UNCALLED for name in layers if name not in found} | others
    return found | {name: Conditioning(None, None, None, 0, reason) for name, reason in missing.items()}


class _Factors:
    """What the layers' two factors are made of, by their weights' names."""

    def __init__(self, per_entry: int | None, centred: bool) -> None:
        self.per_entry, self.centred = per_entry, centred
        self.inputs: dict[str, Moments] = {}
        self.gradients: dict[str, Moments] = {}

    def see(self, name: str, layer: nn.Module, place: Place, tensor: Tensor) -> None:
        if place == "x":
            inputs = self.inputs.setdefault(name, Moments(per_entry=self.per_entry, centred=self.centred))
            inputs.add(input_rows(layer, tensor))
        elif place == "dy":
            self.gradients.setdefault(name, Moments(per_entry=self.per_entry)).add(gradient_rows(layer, tensor))

    def conditioning(self, name: str, exact_to: int) -> Conditioning:
        inputs, gradients = self.inputs[name], self.gradients.get(name)
        if not inputs.seen:
            return Conditioning(None, None, None, 0, "its inputs were empty")
        a = inputs.spectrum(mean=True, exact_to=exact_to)
        if gradients is None or not gradients.seen:
            return Conditioning(union(a), None, None, inputs.seen, UNREACHED)
        s = gradients.spectrum(mean=False, exact_to=exact_to)
        block = union(kronecker(*pair) for pair in zip(a, s, strict=True))
        return Conditioning(union(a), union(s), block, inputs.seen)


def _differentiate(result: Any, loss: Callable[[Tensor], Tensor] | None, taps: Taps) -> None:
    """Backward passes whose gradients at the layers' outputs are those that S sums."""
    if not isinstance(result, Tensor):
        if loss is None and result is None:
            return
        wanted = "the loss, a tensor of one element" if loss is None else "the outputs, a tensor (examples, …)"
        raise OptionError(f"run() returned a {type(result).__name__}; it has to return {wanted}")
    if not (result.requires_grad and taps.inputs):
        return
    # The results are dropped: the hooks see the gradients on their way, and no ``.grad`` is written.
    if loss is None:
        if result.numel() != 1 or result.is_complex():
            raise OptionError(
                f"run() returned a tensor of shape {tuple(result.shape)}, {result.dtype}; it has to return the loss, a "
                "real tensor of one element, or, if these are the model's outputs, conditioning(…, loss=) has to be "
                "the loss of them"
            )
        torch.autograd.grad(result.reshape(()), taps.inputs, allow_unused=True)
        return
    roots = _roots(result.detach(), loss)
    for root in roots.unbind(-1):
        torch.autograd.grad(result, taps.inputs, root.reshape(result.shape), retain_graph=True, allow_unused=True)


def _roots(outputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """R (examples, k, k) with R Rᵀ the Hessian of the loss in each example's k outputs."""
    if outputs.is_complex():
        raise OptionError(
            "the outputs are complex, so that the loss has no Hessian in them; have run() return the loss"
        )
    with torch.enable_grad():
        z = outputs.flatten(1).requires_grad_()
        value = loss(z.reshape(outputs.shape))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise OptionError("loss(outputs) has to return a tensor of one element that depends on the outputs")
        (gradient,) = torch.autograd.grad(value.reshape(()), z, create_graph=True)
        # An example's outputs reach its own part of the loss alone: one product gives a row of each Hessian.
        parts = [gradient[:, k].sum() for k in range(z.shape[1])] if gradient.requires_grad else []
        found = [torch.autograd.grad(part, z, retain_graph=True, materialize_grads=True)[0] for part in parts]
    hessians = in_double(torch.stack(found, dim=1)) if found else in_double(z.detach())[:, :, None] * z.new_zeros(1)
    if not bool(torch.isfinite(hessians).all()):
        return hessians.to(outputs)
    values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
    if values.min() < -1e-3 * values.abs().max():
        raise OptionError(
            f"the loss is not convex in the outputs (a Hessian has the eigenvalue {values.min().item():.3g}), so that "
            "there is no Gauss-Newton matrix; leave loss out for the empirical Fisher matrix"
        )
    # What rounding made of a zero eigenvalue would have a root that is far larger.
    rounding = len(values[0]) * torch.finfo(outputs.dtype).eps * values.amax(-1, keepdim=True)
    return (vectors * torch.where(values > rounding, values, 0).sqrt()[:, None, :]).to(outputs)
