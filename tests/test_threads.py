"""Several threads of a CPU: batches of matrices so large that torch's own LU factorization of them fails there."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.linalg import cayley_step, gram_residual, one_by_one, polar

SHAPES = [(2, 160, 160), (2, 80, 400)]  # the second has 2p×2p systems


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", [torch.linalg.inv, lambda a: torch.linalg.det(a / 9)[..., None, None]])
def test_one_by_one_is_the_function_of_each(function: object, threads: int) -> None:
    a = torch.randn(2, 3, 200, 200, dtype=torch.float64)
    found = one_by_one(function, a)  # type: ignore[arg-type]
    expected = torch.stack([torch.stack([function(m) for m in row]) for row in a])  # type: ignore[operator]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_cayley_of_large_matrices(shape: tuple[int, int, int], threads: int) -> None:
    x = torch.linalg.qr(torch.randn(shape, dtype=torch.float64).mT)[0].mT
    b = torch.randn(shape, dtype=torch.float64)
    a = x.mT @ b - b.mT @ x
    eye = torch.eye(shape[-1], dtype=torch.float64)
    expected = torch.stack([m @ (eye + k / 2) @ torch.linalg.inv(eye - k / 2) for m, k in zip(x, a, strict=True)])
    torch.testing.assert_close(cayley_step(x, b), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 160, 160), (2, 160, 400)])
def test_second_derivatives_of_large_polar_factors(shape: tuple[int, int, int], threads: int) -> None:
    v, g, w = torch.randn(3, *shape, dtype=torch.float64).unbind()

    def second(v: Tensor, g: Tensor, w: Tensor) -> Tensor:
        v = v.clone().requires_grad_()
        (first,) = torch.autograd.grad((polar(v) * g).sum(), v, create_graph=True)
        return torch.autograd.grad((first * w).sum(), v)[0]

    each = torch.cat([second(v[i : i + 1], g[i : i + 1], w[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(second(v, g, w), each)


class Two(nn.Module):
    """Two equal layers, whose weights are computed and moved together."""

    def __init__(self, p: int, n: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(n, p, bias=False), nn.Linear(n, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.one(x) + self.two(x)


CASES = [(name, {}) for name in stiefel.available()] + [
    ("riemannian", {"metric": "canonical", "retraction": "cayley"}),
    ("retraction", {"map": "cayley"}),
    ("torch_orthogonal", {"map": "cayley"}),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))
def test_a_step_of_every_method(name: str, options: dict[str, str], shape: tuple[int, int, int], threads: int) -> None:
    model = Two(*shape[1:])
    try:
        stiefel.constrain(model, name, **options)
    except stiefel.StiefelError as error:
        pytest.skip(str(error))
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.1)
    x = torch.randn(8, shape[-1])
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().mean() + stiefel.penalty(model)).backward()
        optimizer.step()
    method = stiefel.get(name, **options)
    for weight in (model.one.weight, model.two.weight):
        assert weight.isfinite().all()
        if method.claim is not None:
            residual = gram_residual(weight.detach().double()).norm().item() / shape[1] ** 0.5
            assert method.claim.allows(residual, torch.float32, shape[1])
    assert stiefel.report(model) is not None  # which takes determinants of square weights
