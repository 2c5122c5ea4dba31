"""What a random configuration trains: modules of every supported kind, where they start, and what pulls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

import stiefel

# --- modules ---


class Net(nn.Module):
    """Layers and bare parameters, with the names of the tensors to constrain.

    Args:
        names: of the tensors to constrain.
        parts: layers, parameters, and lists of parameters, by their names.
        stacked: the loss sees all named tensors as one, as a program of gates does.
    """

    def __init__(self, *names: str, stacked: bool = False, **parts: Any) -> None:
        super().__init__()
        self.names, self.stacked = names, stacked
        for name, part in parts.items():
            setattr(self, name, part)

    def weights(self) -> list[Tensor]:
        """The named tensors, as the layers use them."""
        found = [getattr(self.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in self.names]
        return [torch.stack(found)] if self.stacked else found

    def forward(self, seed: int) -> Tensor:
        """The mean square of what the layers make of a fixed input; of the weights, where there are no layers.

        Of stacked weights, which are gates: of their product, less a target.
        """
        if self.stacked:
            product = reduce(torch.matmul, self.weights()[0])
            return (product - gaussian(tuple(product.shape), product.dtype, seed)).abs().square().mean()
        outputs = [respond(getattr(self, n), seed) for n in self._modules if n != "parametrizations"]
        return torch.stack([y.abs().square().mean() for y in outputs or self.weights()]).sum()


def respond(layer: nn.Module, seed: int) -> Tensor:
    """What a layer computes from a fixed input."""
    like = next(layer.parameters())

    def values(*shape: int) -> Tensor:
        return gaussian(shape, like.dtype, seed)

    if isinstance(layer, nn.Linear):
        return layer(values(2, layer.in_features))
    if isinstance(layer, nn.RNNBase):
        return layer(values(3, 2, layer.input_size))[0]
    if isinstance(layer, nn.MultiheadAttention):
        return layer(*[values(3, 2, layer.embed_dim)] * 3)[0]
    return layer(values(2, layer.in_channels, *[5] * len(layer.kernel_size)))


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _layer(kind: type[nn.Module], *arguments: int, **options: Any) -> Callable[[bool], Net]:
    return lambda bias: Net("a.weight", a=kind(*arguments, bias=bias, **options))


def _recurrent(kind: type[nn.RNNBase]) -> Callable[[bool], Net]:
    return lambda bias: Net("a.weight_hh_l0", "a.weight_ih_l0", a=kind(3, 4, bias=bias))


def _attention(bias: bool) -> Net:
    return Net("a.in_proj_weight", "a.out_proj.weight", a=nn.MultiheadAttention(6, 2, bias=bias))


def _bare(*shape: int) -> Callable[[bool], Net]:
    return lambda bias: Net("a", a=nn.Parameter(torch.randn(shape)))


def _gates(count: int) -> Callable[[bool], Net]:
    def build(bias: bool) -> Net:
        gates = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(count)])
        return Net(*[f"a.{k}" for k in range(count)], stacked=True, a=gates)

    return build


def _tied(bias: bool) -> Net:
    net = Net("a.weight", a=nn.Linear(5, 3, bias=bias), b=nn.Linear(5, 3, bias=bias))
    net.b.weight = net.a.weight
    return net


def _pair(*shapes: tuple[int, int]) -> Callable[[bool], Net]:
    def build(bias: bool) -> Net:
        return Net("a.weight", "b.weight", **{k: nn.Linear(*s, bias=bias) for k, s in zip("ab", shapes, strict=True)})

    return build


MODELS: dict[str, Callable[[bool], Net]] = {
    "wide": _layer(nn.Linear, 7, 4),
    "tall": _layer(nn.Linear, 4, 7),
    "square": _layer(nn.Linear, 5, 5),
    "row": _layer(nn.Linear, 6, 1),
    "column": _layer(nn.Linear, 1, 6),
    "single": _layer(nn.Linear, 1, 1),
    "conv1": _layer(nn.Conv1d, 3, 4, 3, dilation=2),
    "conv2": _layer(nn.Conv2d, 4, 6, 3, groups=2, stride=2),
    "conv3": _layer(nn.Conv3d, 2, 3, 2),
    "depthwise": _layer(nn.Conv2d, 4, 8, 3, groups=4),
    "up1": _layer(nn.ConvTranspose1d, 4, 3, 3),
    "up2": _layer(nn.ConvTranspose2d, 4, 6, 2, groups=2, stride=2),
    "up3": _layer(nn.ConvTranspose3d, 3, 2, 2, dilation=2),
    "rnn": _recurrent(nn.RNN),
    "lstm": _recurrent(nn.LSTM),
    "gru": _recurrent(nn.GRU),
    "attention": _attention,
    "batch": _bare(3, 2, 5),
    "batches": _bare(2, 2, 4, 3),
    "matrix": _bare(4, 6),
    "gates": _gates(5),
    "tied": _tied,
    "equal": _pair((6, 3), (6, 3)),
    "different": _pair((6, 3), (4, 4)),
}
LARGE: dict[str, Callable[[bool], Net]] = {
    "square 64": _layer(nn.Linear, 64, 64),
    "linear 64×576": _layer(nn.Linear, 576, 64),
    "conv 64×576": _layer(nn.Conv2d, 64, 64, 3),
    "200 gates": _gates(200),
}
BORN: dict[str, Callable[..., Net]] = {
    "OrthogonalLinear": lambda bias, **o: Net("a.weight", a=stiefel.nn.OrthogonalLinear(7, 4, bias=bias, **o)),
    "OrthogonalConv2d": lambda bias, **o: Net("a.weight", a=stiefel.nn.OrthogonalConv2d(3, 4, 3, bias=bias, **o)),
}
"""Layers that are constrained from the start."""
FLAT = ["wide", "tall", "square", "row", "column", "single", "rnn", "gru", "matrix", "gates", "equal", "different"]
"""Those of nothing but matrices, where they have no bias."""
REAL = ("rnn", "lstm", "gru", "attention")
"""Those that torch has in real numbers only."""


def make(name: str, bias: bool, seed: int) -> Net:
    """An unconstrained module; where it would be constrained from the start, one like it."""
    torch.manual_seed(seed)
    build = (MODELS | LARGE).get(name) or partial(BORN[name], constraint="unconstrained")
    return build(bias)


# --- where training starts ---


def _spectrum(w: Tensor, seed: int, singular: Callable[[int], Tensor]) -> Tensor:
    u, _, v = torch.linalg.svd(gaussian((len(w), w[0].numel()), _wide(w.dtype), seed), full_matrices=False)
    return ((u * singular(u.shape[-1])) @ v).reshape(w.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _equal_rows(w: Tensor, seed: int) -> Tensor:
    w = gaussian(tuple(w.shape), _wide(w.dtype), seed)
    w[-1] = w[0]
    return w


STARTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "gaussian": lambda w, seed: gaussian(tuple(w.shape), _wide(w.dtype), seed),
    "orthonormal": lambda w, seed: _spectrum(w, seed, torch.ones),
    "ill-conditioned": lambda w, seed: _spectrum(w, seed, lambda p: torch.logspace(0, -8, p)),
    "rank one": lambda w, seed: _spectrum(w, seed, lambda p: torch.eye(p)[0]),
    "two equal rows": _equal_rows,
    "zero": lambda w, seed: torch.zeros_like(w),
    "ones": lambda w, seed: torch.ones_like(w),
    "1e-20": lambda w, seed: 1e-20 * gaussian(tuple(w.shape), _wide(w.dtype), seed),
    "1e20": lambda w, seed: 1e20 * gaussian(tuple(w.shape), _wide(w.dtype), seed),
}


# --- what pulls the weights: by gradients of unit norm, where they are constant ---

Pull = Callable[[Tensor, Tensor, int], Tensor]
"""A loss of a weight, of where it started, and of a seed."""


def _towards(direction: Pull) -> Pull:
    def loss(w: Tensor, start: Tensor, seed: int) -> Tensor:
        g = direction(w.detach(), start, seed)
        g = g / torch.linalg.vector_norm(g).clamp_min(1e-30)
        return (w.conj() * g).real.sum()  # its gradient may arrive as a conjugate yet to be taken

    return loss


def _rank_one(w: Tensor, start: Tensor, seed: int) -> Tensor:
    return gaussian((len(w), 1), w.dtype, seed).mul(gaussian((1, w[0].numel()), w.dtype, seed + 1)).reshape(w.shape)


def _entry(w: Tensor, start: Tensor, seed: int) -> Tensor:
    g = torch.zeros_like(w)
    g.view(-1)[seed % g.numel()] = 1
    return g


def _pull(w: Tensor, start: Tensor, seed: int) -> Tensor:
    return (w - gaussian(tuple(w.shape), w.dtype, seed)).abs().square().mean() / 2


LOSSES: dict[str, Pull | None] = {
    "linear": _towards(lambda w, start, seed: gaussian(tuple(w.shape), w.dtype, seed)),
    "pull": _pull,
    "flat": lambda w, start, seed: 0 * w.abs().square().sum(),
    "rank one": _towards(_rank_one),
    "normal": _towards(lambda w, start, seed: start),
    "one entry": _towards(_entry),
    "forward": None,  # the model's own
}
