"""``optimizer`` and ``penalty``: what a training loop needs of a constrained model. Imports ``optim`` and below."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stiefel.attach.intact import refuse_taken_over, refuse_waiting, warn_of_replaced
from stiefel.attach.parallel import share_work
from stiefel.attach.tagging import recognize
from stiefel.attach.weights import ConstrainedWeight, constrained_weights
from stiefel.compat.sharding import whole
from stiefel.constraint import Binding, Constraint, Decay, ManifoldMethod, Penalized, StepMethod
from stiefel.errors import OptimizerError
from stiefel.linalg import full_precision, refuse_capture
from stiefel.optim import keep_decay_off
from stiefel.optim.bases import INNER, inner_class, options_of_inner, own_class
from stiefel.optim.buckets import bucket, stack
from stiefel.optim.lbfgs import HeldLBFGS
from stiefel.optim.lift import lift
from stiefel.optim.ownership import restore_counts
from stiefel.optim.probe import make


def optimizer(
    module: nn.Module, cls: type[torch.optim.Optimizer], params: Any = None, **hyper: Any
) -> torch.optim.Optimizer:
    """One optimizer for the whole model, constrained weights and the rest.

        optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)

    For reparameterizations, penalties and controls it is ``cls`` itself. Where a weight is on a geoopt manifold it is a
    subclass of geoopt's RiemannianSGD (for SGD) or RiemannianAdam (for Adam). Where a method acts on the step it is
    ``cls`` lifted: a subclass that feeds the base optimizer the tangent part of the gradient, and hands its
    displacement to the method; ``torch.optim.LBFGS`` has a form of its own, on the sets between evaluations too.
    Weights that weight decay would move along their set get ``param_groups`` of their own without decay, after the
    groups given.

    Args:
        module: the model, constrained before. Where it is the ``DistributedDataParallel`` around it, the processes
            share the steps of methods on large weights.
        cls: an optimizer class.
        params: parameters or parameter groups; default: all of the module's.
        hyper: the optimizer's own options (lr, momentum, ...). Where one is ``optimizer_class``, as of torch's
            ZeroRedundancyOptimizer, the optimizer of that class is the one that is adapted.

    Raises:
        OptimizerError: ``cls`` cannot serve the model's constraints, or not with these options.
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise OptimizerError(f"cls must be an optimizer class such as torch.optim.SGD, got {cls!r}")
    refuse_waiting(module)
    warn_of_replaced(module)
    found = list(constrained_weights(module))
    for owner in {id(weight.owner): weight.owner for weight in found}.values():
        refuse_taken_over(owner)
    for weight in found:  # again: a copy or a conversion since constrain() may have lost the tags
        recognize(weight)
    params = module.parameters() if params is None else params
    methods = [weight.binding.constraint for weight in found]
    kind: dict[Tensor, Decay] = {weight.parameter: weight.binding.constraint.decay for weight in found}
    inner = inner_class(cls, hyper)
    if inner is None:
        made = _made(_form_for(cls, methods), params, hyper, kind)
        share_work(made, module)
        return made
    # An optimizer around another one, as ZeroRedundancyOptimizer: the inner one steps, and needs the form.
    form = _form_for(inner, methods)
    groups = _made(form, params, options_of_inner(cls, hyper), kind).param_groups
    return cls(groups, **{**hyper, INNER: form})


def _form_for(cls: type[torch.optim.Optimizer], methods: list[Constraint]) -> type[torch.optim.Optimizer]:
    """The form of an optimizer class that can step weights held by these methods."""
    if cls is torch.optim.LBFGS and all(isinstance(m, (StepMethod, ManifoldMethod)) for m in methods if m.moves):
        return HeldLBFGS if any(m.moves for m in methods) else cls
    if any(isinstance(m, ManifoldMethod) for m in methods):
        from stiefel.optim.riemannian import riemannian  # imports geoopt, which takes 0.5 s: only where it is needed

        cls = riemannian(cls)
    # After the Riemannian form, because a model with methods of both kinds gets the lifted form of that.
    return lift(cls) if any(m.lifts for m in methods) else cls


def _made(
    cls: type[torch.optim.Optimizer], params: Any, hyper: dict[str, Any], kind: Mapping[Tensor, Decay]
) -> torch.optim.Optimizer:
    made = make(cls, params, hyper)
    try:
        keep_decay_off(made, kind)
    except AttributeError as error:
        raise OptimizerError(f"{own_class(cls).__name__} is not a whole torch optimizer: {error}") from error
    made.register_load_state_dict_post_hook(restore_counts)
    return made


def penalty(module: nn.Module) -> Tensor:
    """The sum of the model's penalties, ``Σ strength · s² Φ(W/s)``, to be added to the loss.

    They are of weights, or, of a reparameterization that needs one, of the proxies: V in the place of W.

    Returns:
        A scalar tensor; exactly 0, without a graph, where no method of the model has a penalty.
    """
    found = [
        w
        for w in constrained_weights(module)
        if isinstance(w.binding.constraint, Penalized) and not w.binding.constraint.lifts
    ]
    if not found:
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        return torch.zeros((), dtype=like.dtype, device=like.device)
    terms = []
    for members in bucket(found, _measured_together):
        binding = members[0].binding
        method, scale = binding.constraint, binding.constraint.fixed_scale
        assert isinstance(method, Penalized)
        with full_precision(members[0].parameter.device):
            x = stack([w.binding.layout for w in members], [whole(w.parameter) for w in members], scaled=True)
            if method.scheduled:
                refuse_capture(x, f"the strength of '{method.name}'")
            strength = method.strength_at(_taken(binding))
            terms.append(strength * scale**2 * method.penalty(x, binding.layout).sum())
    # In one dtype and on one device: those of a model's weights may differ.
    return torch.stack([t.to(terms[0]) for t in terms]).sum()


def _measured_together(w: ConstrainedWeight) -> Hashable:
    binding = w.binding
    # Steps, because a schedule gives weights that have taken equally many the same strength.
    return id(binding.constraint), binding.layout, _taken(binding), w.parameter.dtype, w.parameter.device


def _taken(binding: Binding) -> int:
    """The steps taken, where the strength depends on them; a compiled penalty would depend on what it reads."""
    assert isinstance(binding.constraint, Penalized)
    return binding.tally.steps if binding.constraint.scheduled else 0
