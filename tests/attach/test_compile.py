"""``torch.compile``: every model in one graph, whole training steps, and the same numbers as without it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import stiefel
from stiefel.layout import Layout

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
# Of torch's own doing: it looks at gradients of what goes from one graph of a step into the next, and instantiates
# autograd functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
PROXIED = [m for m in METHODS if stiefel.get(m).place == "forward"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Three equal layers, of which one pass uses two, a convolution, and a tall layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.tall = nn.Conv2d(2, 6, 3), nn.Linear(24, 32)
        self.a, self.b, self.unused, self.head = (
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor, every: bool = False) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.tall(self.convolution(x).flatten(1)))))))
        return self.head(self.unused(x) if every else x)


def twins(method: str | stiefel.Constraint, **options: Any) -> tuple[nn.Module, nn.Module]:
    model = stiefel.constrain(Net(), method, **{"exclude": ["head"], **options})
    return model, copy.deepcopy(model)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.randint(5, (8,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def close(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for a, b in zip(gradients(one), gradients(other), strict=True):
        assert (a is None) == (b is None)  # a layer that the pass does not use keeps no gradient
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_is_one_graph_with_the_same_numbers(method, backend):
    one, other = twins(method, scale="relu")
    compiled, (x, y) = torch.compile(other, backend=backend, fullgraph=True), inputs()
    for _ in range(2):
        out, same = one(x), compiled(x)
        assert torch.equal(out, same)
        cross_entropy(out, y).backward()
        cross_entropy(same, y).backward()
        close(one, other, 1e-6)
    one.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(one(x), compiled(x))
    assert other.unused.weight.grad is None if method not in PROXIED else True
    copy.deepcopy(other)  # nothing of the trace is left on it


@pytest.mark.parametrize("method", ["own", "householder", "bjorck"])
def test_learnable_gains_in_a_graph(method):
    one, other = twins(method, scale="learnable", layers=["a", "b"], exclude=[])
    x, y = inputs()
    cross_entropy(one(x), y).backward()
    cross_entropy(torch.compile(other, backend="aot_eager", fullgraph=True)(x), y).backward()
    close(one, other, 1e-6)


@pytest.mark.parametrize("method", PROXIED)
def test_a_weight_is_one_operation(method):
    _, model = twins(method)
    graphs = []

    def kept(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(model, backend=kept, fullgraph=True)(inputs()[0])
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "stiefel.weight" in str(node.target)]
    assert len(calls) == 4  # two of the equal layers, the convolution, the tall layer; not what the pass does not use


@dataclass(frozen=True, kw_only=True)
class Own(stiefel.Reparameterization):
    """A user's method, which no process can make again from its name."""

    name = "test_unregistered"
    summary = "Cayley's map"
    reference = "none"
    factor: float = 1.0

    def forward(self, proxy: Tensor, layout: Layout) -> Tensor:
        return torch.nn.functional.normalize(proxy, dim=-1) * self.factor


def test_a_method_that_is_not_registered_is_traced_through():
    one, other = twins(Own(), layers=["a", "b"], exclude=[])
    x, y = inputs()
    cross_entropy(one(x), y).backward()
    cross_entropy(torch.compile(other, backend="aot_eager", fullgraph=True)(x), y).backward()
    close(one, other, 1e-6)


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam])
def test_a_whole_training_step_compiles_once(method, cls):
    one, other = twins(method)
    hyper = {"lr": 0.05, "momentum": 0.9} if cls is torch.optim.SGD else {"lr": 0.01}
    x, y = inputs()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + stiefel.penalty(model)
        loss.backward()
        optimizer.step()
        return loss

    first, second = (stiefel.optimizer(model, cls, **hyper) for model in (one, other))
    compiled, graphs = torch.compile(step, backend="eager"), []
    for _ in range(6):
        step(one, first)
        compiled(other, second)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2:] == [graphs[2]] * 4  # none after the third step
    # torch's own Adam takes another formula under a compiler.
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert method == "own_pca" or torch.allclose(p, q, rtol=0, atol=1e-4)
    if stiefel.get(method).feasible:
        assert stiefel.report(other).worst < 1e-6


@pytest.mark.sampled(8, values=False)
@pytest.mark.parametrize("method", METHODS)
def test_reduced_precision_of_products_stays_outside_of_the_graphs_weights(method):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        _, model = twins(method)
        seen = {}
        for name in ("a", "tall"):
            layer = getattr(model, name)
            layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: layer.weight.detach()}))
        x, _ = inputs()
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        for weight in seen.values():
            x = weight if weight.shape[0] <= weight.shape[1] else weight.mT
            residual = torch.linalg.matrix_norm((x @ x.mT).double() - torch.eye(len(x)))
            assert not stiefel.get(method).feasible or residual < 1e-5
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.sampled(2, values=False)
@pytest.mark.parametrize("method", ["own", "bjorck", "retraction"])
def test_inductor_on_a_cpu(method):
    one, other = twins(method)
    compiled, (x, y) = torch.compile(other, fullgraph=True), inputs()
    first, second = (stiefel.optimizer(model, torch.optim.SGD, lr=0.05) for model in (one, other))
    for _ in range(3):
        for model, called, optimizer in ((one, one, first), (other, compiled, second)):
            optimizer.zero_grad()
            cross_entropy(called(x), y).backward()
            optimizer.step()
            del model
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
