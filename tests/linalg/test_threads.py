"""Several threads of a CPU: batches of matrices so large that torch's own LU factorization of them fails there."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.linalg import cayley_step, full_precision, gram_residual, one_by_one, polar, qf
from stiefel.linalg.lu import TOGETHER, inverse_of, solve, solve_from_the_right
from stiefel.manifold.retractions import retract_cayley

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


def test_what_fails_together_is_never_tried_together() -> None:
    assert TOGETHER < 150  # where MKL's factorization starts threads of its own, and a batch may hang


@pytest.mark.parametrize(("a", "b"), [((3, 1), (1, 2)), ((2,), ()), ((), (2,)), ((1,), (3,)), ((), ())])
@pytest.mark.parametrize("n", [4, 160])
def test_solves_broadcast(a: tuple[int, ...], b: tuple[int, ...], n: int, threads: int) -> None:
    matrix, right = torch.randn(*a, n, n, dtype=torch.float64), torch.randn(*b, n, 2, dtype=torch.float64)
    found = solve(matrix, right)
    assert found.shape == (*torch.broadcast_shapes(a, b), n, 2)
    torch.testing.assert_close(matrix @ found, right.expand_as(found), atol=1e-7, rtol=1e-7)
    left = solve_from_the_right(right.mT, matrix)
    torch.testing.assert_close(left @ matrix, right.mT.expand_as(left), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_solves(dtype: torch.dtype, threads: int) -> None:
    a = (torch.randn(2, 3, 3, dtype=dtype) + 3 * torch.eye(3)).requires_grad_()
    b = torch.randn(2, 3, 2, dtype=dtype, requires_grad=True)
    for function in (solve, lambda a, b: solve_from_the_right(b.mT, a), lambda a, b: inverse_of(a) @ b):
        assert torch.autograd.gradcheck(function, (a, b), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, (a, b))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_triangular_factor_has_a_positive_diagonal(dtype: torch.dtype, size: float, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.eye(128) + size * torch.randn(2, 128, 128, generator=generator, dtype=dtype) / 128**0.5
    q = qf(a.requires_grad_())
    factor = a.detach() @ q.detach().mH
    eps = torch.finfo(dtype).eps
    assert float(factor.triu(1).abs().max()) < 100 * eps
    assert float(factor.diagonal(dim1=-2, dim2=-1).imag.abs().max()) < 100 * eps
    assert float(factor.diagonal(dim1=-2, dim2=-1).real.min()) > 0
    if dtype == torch.complex128:  # the gradient is that of the factor so fixed
        g, d = (torch.randn(a.shape, generator=generator, dtype=dtype) for _ in range(2))
        (q * g.conj()).real.sum().backward()
        h = 1e-6
        with torch.no_grad():
            ends = [float((qf(a + k * h * d) * g.conj()).real.sum()) for k in (1, -1)]
        assert float((a.grad * d.conj()).real.sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_solves_under_transforms(threads: int) -> None:
    a, b = torch.randn(2, 160, 160, dtype=torch.float64), torch.randn(160, 3, dtype=torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(solve, (0, None))(a, b), torch.stack([torch.linalg.solve(m, b) for m in a])
    )
    x = torch.linalg.qr(torch.randn(4, 160, 160, dtype=torch.float64))[0]
    u = 0.1 * (x - x @ x.mT @ x.mT @ x)
    u = u - (x @ u.mT) @ x
    torch.testing.assert_close(torch.func.vmap(retract_cayley)(x, u), retract_cayley(x, u))
    slopes = torch.func.jacrev(lambda t: retract_cayley(x[0], t * u[0]).sum())(torch.ones(3, dtype=torch.float64)[0])
    t = torch.ones((), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(retract_cayley(x[0], t * u[0]).sum(), t)
    torch.testing.assert_close(slopes, expected)


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


@pytest.mark.sampled(12, values=False)
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


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no such setting")
@pytest.mark.parametrize("first_out", [0, 1])
def test_full_precision_lasts_until_the_last_thread_is_out(first_out: int) -> None:
    """The setting is one of the process: a thread that leaves must not take it from another."""
    setting, cpu = torch.backends.mkldnn.matmul, torch.device("cpu")
    before = setting.fp32_precision
    both_in, may_leave, seen = threading.Barrier(3), [threading.Event(), threading.Event()], {}

    def work(number: int) -> None:
        with full_precision(cpu), full_precision(cpu):
            both_in.wait()
            may_leave[number].wait()
            seen[number] = setting.fp32_precision

    setting.fp32_precision = "bf16"
    try:
        workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for worker in workers:
            worker.start()
        both_in.wait()
        for number in (first_out, 1 - first_out):
            assert setting.fp32_precision == "ieee"
            may_leave[number].set()
            workers[number].join()
        assert seen == {0: "ieee", 1: "ieee"}
        assert setting.fp32_precision == "bf16"  # what the user had set
    finally:
        setting.fp32_precision = before
