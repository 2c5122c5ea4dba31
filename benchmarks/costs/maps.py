"""The catalogue of maps from proxies to weights: forward and backward of all matrices. Imports ``cases``, stiefel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import stiefel
from costs.cases import TURN, Candidate, Case, Layers, Work
from stiefel.attach import constrained_weights
from stiefel.constraint import Reparameterization
from stiefel.constraint.trivialization import Trivialization
from stiefel.layout import Layout
from stiefel.linalg import full_precision
from stiefel.linalg.polar import SOLVERS, polar

REFERENCE = "SVD loop"
PRODUCT = "product"

Map = Callable[[Tensor], Tensor]


def maps() -> list[Candidate]:
    """All maps; first the unit, then the reference, then ours and the peers'."""
    conditioned = partial(Candidate, conditioned=True)
    found = [
        Candidate(PRODUCT, "unit", product),
        conditioned(REFERENCE, "reference", svd_loop, per_layer=True),
        Candidate("floor: 5 products, eigh", "floor", partial(floor, factorize=torch.linalg.eigh)),
        Candidate("floor: 5 products, Cholesky", "floor", partial(floor, factorize=torch.linalg.cholesky)),
    ]
    for name in ("own", "oni", "bjorck", "own_pca", "cayley", "matrix_exp", "householder", "dissolving"):
        of_proxy = not _from_start(name)
        found += [
            Candidate(name, "ours", partial(layers, name=name), conditioned=of_proxy, short=name != "own_pca"),
            Candidate(f"{name}, function", "ours", partial(function, name=name), conditioned=of_proxy, short=False),
        ]
    found += [conditioned(f"own, {solver}", "ours", partial(solved, solver=solver)) for solver in SOLVERS]
    found += [
        Candidate(
            f"torch {kind}", "torch", partial(torch_orthogonal, kind=kind), per_layer=True, short=kind != "householder"
        )
        for kind in ("matrix_exp", "cayley", "householder")
    ]
    found += [
        Candidate(
            f"geotorch {kind}",
            "geotorch",
            partial(geotorch_orthogonal, kind=kind),
            needs="geotorch",
            per_layer=True,
            short=kind == "expm",
        )
        for kind in ("expm", "cayley")
    ]
    return [
        *found,
        conditioned("orthogonium Björck", "orthogonium", bjorck_layers, needs="orthogonium", per_layer=True),
    ]


def differentiated(compute: Callable[[], list[Tensor]], inputs: Iterable[Tensor], gradients: list[Tensor]) -> Work:
    """The weights, and the gradients with respect to the tensors that they depend on."""
    leaves = list(inputs)

    def result() -> list[Tensor]:
        with torch.enable_grad():  # as timed: without gradients layers compute one by one, by another solver
            return [torch.cat([w.reshape(-1, *w.shape[-2:]) for w in compute()])]

    return Work(lambda: torch.autograd.grad(compute(), leaves, gradients), result)


def of_batch(case: Case, proxies: Tensor, compute: Map) -> Work:
    """A function of all proxies at once."""
    leaf = proxies.requires_grad_()

    def exact() -> list[Tensor]:
        with full_precision(case.device):
            return [compute(leaf)]

    return differentiated(exact, [leaf], [case.gradients()])


def of_layers(case: Case, model: Layers, values: Tensor) -> Work:
    """The weights of a model's layers, whose first proxies get these values."""
    proxies = _proxies(model)
    with torch.no_grad():
        for proxy, v in zip(proxies, values, strict=True):
            proxy.copy_(v)
    return differentiated(model, proxies, list(case.gradients()))


def _proxies(model: Layers) -> list[Tensor]:
    layers: Iterable[Any] = model.layers
    return [layer.parametrizations.weight.original for layer in layers]


def product(case: Case) -> Work:
    """The unit: one batched p×n · n×p product, without a gradient."""
    x = case.proxies()
    return Work(lambda: torch.bmm(x, x.mT))


def floor(case: Case, factorize: Callable[[Tensor], Any]) -> Work:
    """Five such products and one factorization of a p×p matrix: what OWN, forward and backward, cannot do without."""
    x = case.proxies()
    gram = torch.bmm(x, x.mT)
    return Work(lambda: (*(torch.bmm(x, x.mT) for _ in range(5)), factorize(gram)))


def svd_loop(case: Case) -> Work:
    """OWN layer by layer, as it is first written down: X = U Wᴴ of the SVD, with torch's own derivative.

    That derivative is not finite where singular values repeat, which at these proxies they do not.
    """
    leaves = [v.requires_grad_() for v in case.proxies()]

    def compute() -> list[Tensor]:
        return [u @ wh for u, _, wh in (torch.linalg.svd(v, full_matrices=False) for v in leaves)]

    return differentiated(compute, leaves, list(case.gradients()))


def _method(name: str) -> Reparameterization:
    method = stiefel.get(name, **stiefel.get(name).comparison)
    assert isinstance(method, Reparameterization)
    return method


def _from_start(name: str) -> bool:
    """Whether the map starts at a fixed point, so that the condition number of its proxy does not matter."""
    return isinstance(_method(name), Trivialization) or bool(_method(name).start(torch.eye(2)[None], Layout((2, 2)))[1])


def _start(method: Reparameterization, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """A proxy that training has moved, and the method's other tensors."""
    proxy, parts = method.start(case.points(), Layout((case.p, case.n)))
    return (proxy + TURN * case.placed(case.gaussian(2)) if _from_start(method.name) else case.proxies()), parts


def layers(case: Case, name: str) -> Work:
    """Ours by name: one layer per matrix, whose weights the model's forward pass computes together."""
    method = _method(name)
    model = Layers(case)
    stiefel.constrain(model, method)
    work = of_layers(case, model, _start(method, case)[0])
    assert sum(1 for _ in constrained_weights(model)) == case.count
    return work


def function(case: Case, name: str) -> Work:
    """Ours without modules: the method on a stacked proxy."""
    method = _method(name)
    proxies, parts = _start(method, case)
    return of_batch(case, proxies, lambda v: method.forward(v, Layout((case.p, case.n)), **parts))


def solved(case: Case, solver: str) -> Work:
    """OWN by one of its solvers, on a stacked proxy."""
    return of_batch(case, case.proxies(), partial(polar, solver=solver))


def torch_orthogonal(case: Case, kind: str) -> Work:
    """torch's parametrization, on each layer."""
    model = Layers(case)
    for layer in model.layers:
        orthogonal(layer, orthogonal_map=kind)
    return of_layers(case, model, _moved(case, model))


def geotorch_orthogonal(case: Case, kind: str) -> Work:
    """geotorch's parametrization, on each layer. It starts at a point of its own."""
    import geotorch

    model = Layers(case)
    for layer in model.layers:
        geotorch.orthogonal(layer, "weight", triv=kind)
    return of_layers(case, model, _moved(case, model))


def _moved(case: Case, model: Layers) -> Tensor:
    """The proxies of layers a little away from where they are; not on the diagonal, where torch keeps signs."""
    noise = TURN * case.placed(case.gaussian(2))
    noise.diagonal(dim1=-2, dim2=-1).zero_()
    return torch.stack(_proxies(model)).detach() + noise


def bjorck_layers(case: Case) -> Work:
    """orthogonium's linear layers in their default form: a power iteration, then Björck's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings have escapes that Python warns of
        from orthogonium.layers.linear import OrthoLinear

    model = Layers(case)
    model.layers = nn.ModuleList(
        OrthoLinear(case.n, case.p, bias=False).to(case.device, case.dtype) for _ in range(case.count)
    )
    return of_layers(case, model, case.proxies())
