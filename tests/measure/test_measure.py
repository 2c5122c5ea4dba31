"""What a step costs and does: FLOPs against counted loops, signals against closed forms, energy, memory, time."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from common import training_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import stiefel
from stiefel.errors import OptionError, UncountedOperatorError
from stiefel.measure import count, preservation, redundancy, step_cost
from stiefel.measure.cost import clock, environment, memory
from stiefel.measure.cost.clock import StepClock, interleaved
from stiefel.measure.cost.energy import EnergyMeter
from stiefel.measure.cost.formulas import FACTORIZATIONS, PRODUCTS, exponential_products, svd_flops
from stiefel.measure.cost.step import computed, gpu_cost

CPU = torch.device("cpu")
L = torch.linalg


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def definite(n: int) -> Tensor:
    a = random(n, n)
    return a @ a.mT + n * torch.eye(n, dtype=a.dtype)


# --- loops that count what a textbook algorithm does: a multiplication and an addition each one ---


def loop_lu(m: int, n: int) -> int:
    """Every step divides the column below the pivot and updates what is right of it."""
    return sum((m - j - 1) + 2 * (m - j - 1) * (n - j - 1) for j in range(min(m, n)))


def loop_cholesky(n: int) -> int:
    return sum(2 * k + 1 for i in range(n) for k in range(i + 1))


def loop_triangular(n: int, columns: int) -> int:
    return columns * sum(2 * i + 1 for i in range(n))


def loop_reflect(rows: int, columns: int) -> int:
    """C ← C − v (2 vᵀC): a product with a vector and an update of rank one."""
    return 4 * rows * columns


def loop_qr(m: int, n: int) -> int:
    return sum(2 * (m - j) + loop_reflect(m - j, n - j - 1) for j in range(min(m, n)))


def loop_form_q(m: int, n: int, k: int) -> int:
    """The first n columns of H₁…H_k, backwards, so that only the trailing block is touched."""
    return sum(loop_reflect(m - j, n - j) for j in range(k))


def loop_bidiagonal(m: int, n: int) -> int:
    """A reflector from the left and one from the right for each column."""
    return sum(loop_reflect(m - j, n - j - 1) + loop_reflect(m - j, n - j - 1) for j in range(n))


def loop_tridiagonal(n: int) -> int:
    """A ← HAH of the trailing symmetric block: p = Av, then an update of rank two of one triangle."""
    return sum(2 * s * s + 2 * s * s for s in range(1, n))


N, M, R = 60, 90, 7
B = random(N, R)
LOOPS: dict[str, tuple[Callable[[], object], int]] = {
    "lu": (lambda: L.lu_factor(random(N, N)), loop_lu(N, N)),
    "lu tall": (lambda: L.lu_factor(random(M, N)), loop_lu(M, N)),
    "lu wide": (lambda: L.lu(random(N, M)), loop_lu(N, M)),
    "det": (lambda: L.det(random(N, N)), loop_lu(N, N)),
    "slogdet": (lambda: L.slogdet(random(N, N)), loop_lu(N, N)),
    "cholesky": (lambda: L.cholesky(definite(N)), loop_cholesky(N)),
    "triangular": (lambda: L.solve_triangular(definite(N).tril(), B, upper=False), loop_triangular(N, R)),
    "triangular right": (
        lambda: L.solve_triangular(definite(N).tril(), B.mT, upper=False, left=False),
        loop_triangular(N, R),
    ),
    "cholesky_solve": (lambda: torch.cholesky_solve(B, definite(N).tril()), 2 * loop_triangular(N, R)),
    "solve": (lambda: L.solve(random(N, N), B), loop_lu(N, N) + 2 * loop_triangular(N, R)),
    "solve vector": (lambda: L.solve(random(N, N), B[:, 0]), loop_lu(N, N) + 2 * loop_triangular(N, 1)),
    "inv": (
        lambda: L.inv(random(N, N)),
        loop_lu(N, N) + loop_cholesky(N) + loop_triangular(N, N),
    ),  # U⁻¹, then X L = U⁻¹
    "qr r": (lambda: L.qr(random(M, N), mode="r"), loop_qr(M, N)),
    "qr wide r": (lambda: L.qr(random(N, M), mode="r"), loop_qr(N, M)),
    "qr": (lambda: L.qr(random(M, N)), loop_qr(M, N) + loop_form_q(M, N, N)),
    "qr complete": (lambda: L.qr(random(M, N), mode="complete"), loop_qr(M, N) + loop_form_q(M, M, N)),
    "geqrf": (lambda: torch.geqrf(random(M, N)), loop_qr(M, N)),
    "householder": (lambda: L.householder_product(random(M, N), torch.ones(R).double()), loop_form_q(M, N, R)),
    "ormqr": (
        lambda: torch.ormqr(random(M, N), torch.ones(N).double(), random(M, R)),
        sum(loop_reflect(M - j, R) for j in range(N)),
    ),
    "ormqr right": (
        lambda: torch.ormqr(random(M, N), torch.ones(N).double(), random(R, M), left=False),
        sum(loop_reflect(M - j, R) for j in range(N)),
    ),
    "ldl": (lambda: L.ldl_factor(definite(N)), loop_cholesky(N)),
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_formula_is_what_a_loop_counts(case: str) -> None:
    step, expected = LOOPS[case]
    step_with_inputs = count(step)
    products = step_with_inputs.matmul_flops  # of making a definite input
    assert products in (0, 2 * N**3)
    assert step_with_inputs.factorization_flops == pytest.approx(expected, rel=0.06)  # the leading order, at n = 60


def test_the_reductions_are_what_the_constants_of_the_iterations_start_from() -> None:
    """Values alone cost the reduction to (bi- or tri-)diagonal form, to leading order."""
    n, m = 400, 700
    assert count(lambda: L.eigvalsh(definite(50))).factorization_flops == round(4 * 50**3 / 3)
    assert loop_tridiagonal(n) == pytest.approx(4 * n**3 / 3, rel=0.01)
    assert loop_bidiagonal(m, n) == pytest.approx(4 * m * n**2 - 4 * n**3 / 3, rel=0.01)
    assert svd_flops(n, n, None) == pytest.approx(loop_bidiagonal(n, n), rel=0.01)
    # Tall enough: QR first, then the reduction of R.
    assert svd_flops(20 * n, n, None) == pytest.approx(loop_qr(20 * n, n) + loop_bidiagonal(n, n), rel=0.01)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: L.eigh(definite(10)), 9_000),
        (lambda: L.eigvalsh(definite(10)), 1_333),
        (lambda: L.svd(random(10, 10)), 21_000),
        (lambda: L.svd(random(10, 10), full_matrices=False), 21_000),
        (lambda: L.svdvals(random(10, 10)), 2_667),
        (lambda: L.svdvals(random(30, 10)), 8_000),
        (lambda: L.svd(random(10, 100), full_matrices=False), 6 * 10**4 + 20_000),
        (lambda: L.eig(random(10, 10)), 26_333),
        (lambda: L.eigvals(random(10, 10)), 10_000),
        (lambda: L.pinv(random(100, 10)), 80_000 + 2 * 10**4),
        (lambda: L.lstsq(random(30, 10), random(30, 2)), round(2 * 100 * (30 - 10 / 3) + 2 * (1200 - 200 + 100))),
        (lambda: L.lstsq(random(30, 10), random(30, 2), driver="gelsd"), 2 * 30 * 100 + 11_000 + 2 * (600 + 200)),
        (lambda: torch.cholesky_inverse(definite(10)), 667),
        (lambda: L.lu_solve(*L.lu_factor(random(10, 10)), random(10, 3)), 667 + 600),
        (lambda: L.ldl_solve(*L.ldl_factor(definite(10)), random(10, 3)), 333 + 600),
        (lambda: L.matrix_norm(random(10, 10), 2), 2_667),
        (lambda: L.vector_norm(random(10, 10)) + L.matrix_norm(random(10, 10)), 0),
        (lambda: L.cross(random(4, 3), random(4, 3)), 0),
    ],
)
def test_known_constants(step: Callable[[], object], expected: int) -> None:
    assert count(step).factorization_flops == pytest.approx(expected, abs=1)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
def test_the_older_triangular_solve() -> None:
    assert count(lambda: torch.triangular_solve(random(10, 3), random(10, 10))).factorization_flops == 300


def test_values_alone_cost_less_unless_a_gradient_is_wanted() -> None:
    a = random(10, 10).requires_grad_()
    assert count(lambda: L.svdvals(a)).factorization_flops == 21_000
    with torch.no_grad():
        assert count(lambda: L.svdvals(a)).factorization_flops == 2_667


def test_a_batch_counts_each_and_complex_counts_four_times() -> None:
    one = count(lambda: L.qr(random(6, 4)))
    assert count(lambda: L.qr(random(2, 3, 6, 4))).factorization_flops == pytest.approx(
        6 * one.factorization_flops, abs=3
    )
    a = random(6, 4, dtype=torch.complex128)
    assert count(lambda: L.qr(a)).factorization_flops == pytest.approx(4 * one.factorization_flops, abs=3)
    assert count(lambda: a @ a.mH).matmul_flops == 4 * 2 * 6 * 4 * 6
    assert count(lambda: torch.mv(a, a[0])).matmul_flops == 4 * 2 * 6 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("norm", [0.0, 1e-20, 1e-9, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 1.2, 2.0, 3.5, 7.0, 100.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_exponential_takes_the_products_that_a_profiler_sees(batch: int, norm: float, dtype: torch.dtype) -> None:
    a = random(batch, 8, 8, dtype=dtype)
    a = a * norm / a.abs().sum(-2).amax(-1)[:, None, None] * torch.tensor([1.0, 0.9, 1e-3])[:batch, None, None]
    with profile() as seen:
        L.matrix_exp(a)
    products = 0
    with profile(record_shapes=True) as seen:
        L.matrix_exp(a)
    for event in seen.events():
        if event.name == "aten::bmm":
            products += event.input_shapes[0][0]
    assert exponential_products(a) == products


def test_a_formula_serves_torchs_own_counter() -> None:
    a = random(5, 5)
    counter = FlopCounterMode(display=False, custom_mapping=FACTORIZATIONS)
    with counter:
        L.inv(a) @ a
    assert counter.get_total_flops() == 2 * 5**3 + 2 * 5**3


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 12), nn.Linear(12, 5)
    )


@pytest.mark.sampled(3, values=False)
@pytest.mark.parametrize("method", stiefel.available())
def test_a_training_step_of_every_method_can_be_counted(method: str) -> None:
    model = stiefel.constrain(small_network(), method, exclude=["5"])
    x = random(8, 2, 7, 7, dtype=torch.float32)
    step = training_step(model, stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9), x)
    first, second = count(step), count(step)
    free = small_network()
    plain = count(training_step(free, torch.optim.SGD(free.parameters(), lr=0.01), x))
    assert second.matmul_flops >= plain.matmul_flops
    assert second.operators >= plain.operators > 20
    assert plain.factorization_flops == 0
    assert abs(first.operators - second.operators) <= 0.2 * first.operators  # buffers are made in the first


def test_products_are_counted_as_torch_counts_them() -> None:
    torch.manual_seed(0)
    for network, x in (
        (nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2)), random(2, 3, 9, 9)),
        (nn.ConvTranspose2d(3, 6, 2, stride=2), random(2, 3, 5, 5)),
        (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), random(4, 5)),
    ):
        model, x = network.double(), x.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        assert count(lambda: model(x).sum().backward()).matmul_flops == counter.get_total_flops()  # noqa: B023


def test_a_grouped_convolution_costs_as_much_backward_as_its_groups_alone() -> None:
    x = random(2, 8, 6, 6).requires_grad_()
    whole = nn.Conv2d(8, 8, 3, groups=4, bias=False).double()
    one, part = nn.Conv2d(2, 2, 3, bias=False).double(), random(2, 2, 6, 6).requires_grad_()
    groups = count(lambda: one(part).sum().backward()).matmul_flops * 4
    assert count(lambda: whole(x).sum().backward()).matmul_flops == groups == 3 * 2 * 2 * 16 * whole.weight.numel()


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_network_counts_its_products(cell: Any) -> None:
    net, x = cell(5, 7), random(3, 2, 5, dtype=torch.float32)
    gates = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}[cell]
    forward = 2 * 3 * 2 * gates * 7 * (5 + 7)
    assert count(lambda: net(x)).matmul_flops == forward
    backward = count(lambda: net(x)[0].sum().backward()).matmul_flops - forward
    assert 0.6 * 2 * forward <= backward <= 2 * forward  # the gradients of x and of the first state are not wanted


def test_attention_counts_scores_and_values() -> None:
    q, k, v = (random(2, 4, length, 8, dtype=torch.float32) for length in (5, 6, 6))
    assert count(lambda: F.scaled_dot_product_attention(q, k, v)).matmul_flops == 2 * 2 * 4 * 5 * 6 * (8 + 8)


@pytest.mark.parametrize(
    ("step", "flops"),
    [
        (lambda: torch.dot(random(9), random(9)), 18),
        (lambda: torch.addmv(random(4), random(4, 9), random(9)), 72),
        (lambda: torch.addbmm(random(4, 5), random(3, 4, 9), random(3, 9, 5)), 2 * 3 * 4 * 9 * 5),
        (lambda: F.bilinear(random(6, 3), random(6, 4), random(5, 3, 4)), 3 * 6 * 5 * 3 * 4),
        (lambda: torch.einsum("bij,bjk->bik", random(2, 3, 4), random(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda: random(50) * random(50) + random(50).sqrt(), 0),
    ],
    ids=["dot", "addmv", "addbmm", "bilinear", "einsum", "entrywise"],
)
def test_other_products(step: Callable[[], object], flops: int) -> None:
    assert count(step).matmul_flops == flops


def test_composite_operators_are_counted_under_inference_mode() -> None:
    layer, x = nn.Linear(4, 3), random(5, 4, dtype=torch.float32)
    with torch.inference_mode():
        assert count(lambda: layer(x)).matmul_flops == 2 * 5 * 4 * 3


def test_operators_leave_out_views_and_allocations() -> None:
    x = random(4, 4)
    found = count(lambda: (x.mT.reshape(2, 8).detach(), torch.empty(3), x + x, x.T @ x))
    assert found.calls == {"add": 1, "mm": 1, "clone": 1}
    assert found.operators == 3
    assert found.flops == {"mm": 128}


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(inverse := L.inv(a))
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ gradients[0] @ inverse.mT


@pytest.mark.parametrize("foreach", [False, True])
def test_custom_functions_and_foreach_optimizers_are_counted(foreach: bool) -> None:
    a = definite(6).requires_grad_()
    optimizer = torch.optim.Adam([a], foreach=foreach)

    def step() -> None:
        _Inverse.apply(a).sum().backward()
        optimizer.step()

    found = count(step)
    assert (found.factorization_flops, found.matmul_flops) == (2 * 6**3, 2 * 2 * 6**3)
    assert any("foreach" in name for name in found.calls) is foreach


def test_an_operator_without_a_formula_is_an_error_and_the_step_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FACTORIZATIONS, torch.ops.aten.linalg_qr)
    ended = []

    def step() -> None:
        L.qr(random(4, 4))
        ended.append(True)

    with pytest.raises(UncountedOperatorError, match=r"aten\.linalg_qr.*zero would be wrong"):
        count(step)
    assert ended
    found = computed(step)
    assert found["operators"] is found["matmul_flops"] is found["factorization_flops"] is None
    assert "linalg_qr" in found["flops_reason"]


def test_every_linear_algebra_operator_of_torch_is_counted_or_refused() -> None:
    """None of aten's operators with such a name has a count of zero by oversight."""
    from stiefel.measure.cost.flops import _FREE, _LINEAR_ALGEBRA

    names = {n.removeprefix("aten::").split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "aten::" in n}
    linear = {n for n in names if _LINEAR_ALGEBRA & set(n.split("_"))}
    assert {op.__name__ for op in {*FACTORIZATIONS, *PRODUCTS}} <= linear
    assert {op.__name__ for op in _FREE} <= linear
    entrywise = {"sqrt", "relu", "elu", "detach", "resolve_conj", "prelu", "norm", "cumsum", "diag_embed", "trace"}
    assert not entrywise & linear


# --- signals ---


class Tower(nn.Module):
    """Linear layers with what people put between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("method", ["own", "retraction"])
def test_a_square_orthogonal_layer_keeps_energy_both_ways(method: str, scale: float) -> None:
    model = Tower(6, 6, 6).double()
    stiefel.constrain(model, method, scale=scale)
    x = random(9, 6)
    with torch.no_grad():
        for layer in model.layers:
            layer.bias.zero_()
    found = preservation(model, lambda: model(x).pow(3).sum())
    assert list(found) == ["layers.0.weight", "layers.1.weight"]
    for depth, row in enumerate(found.values()):
        assert row.forward == pytest.approx(scale, rel=1e-12)
        assert row.backward == pytest.approx(scale, rel=1e-12)
        assert row.forward_total == pytest.approx(scale ** (depth + 1), rel=1e-12)
        assert row.backward_total == pytest.approx(scale ** (2 - depth), rel=1e-12)
        assert (row.calls, row.reason) == (1, None)


def test_fewer_outputs_keep_what_lies_in_the_row_space() -> None:
    model = nn.Linear(8, 3).double()
    stiefel.constrain(model, "own", center=False)
    x, w = random(20, 8), model.weight.detach()
    inside = x @ w.mT @ w
    (row,) = preservation(model, lambda: model(x).pow(2).sum()).values()
    assert row.forward == pytest.approx((inside.norm() / x.norm()).item(), rel=1e-12)
    assert 0.3 < row.forward < 0.9
    assert row.backward == pytest.approx(1, rel=1e-12)
    tall = stiefel.constrain(nn.Linear(3, 8).double(), "retraction")
    (row,) = preservation(tall, lambda: tall(x[:, :3]).pow(2).sum()).values()
    assert row.forward == pytest.approx(1, rel=1e-12)


def test_the_bias_is_no_part_of_the_map_and_the_batch_is_averaged_as_squares() -> None:
    layer = nn.Linear(2, 2).double()
    stiefel.constrain(layer, "unconstrained")
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        layer.bias.fill_(100.0)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    (row,) = preservation(layer, lambda: layer(x).sum()).values()
    assert row.forward == pytest.approx(((9 + 4) / (1 + 4)) ** 0.5)
    assert row.backward == pytest.approx((10 / 2) ** 0.5)


def test_a_convolution_that_tiles_keeps_energy_and_one_that_overlaps_multiplies_it() -> None:
    x = random(4, 2, 8, 8)
    tiles = stiefel.constrain(nn.Conv2d(2, 8, 2, stride=2).double(), "retraction")
    (row,) = preservation(tiles, lambda: tiles(x).pow(2).sum()).values()
    assert row.forward == pytest.approx(1, rel=1e-12)
    assert row.backward == pytest.approx(1, rel=1e-12)
    overlaps = stiefel.constrain(nn.Conv2d(2, 8, 2, padding=1).double(), "retraction")
    (row,) = preservation(overlaps, lambda: overlaps(x).pow(2).sum()).values()
    assert row.forward == pytest.approx(2, rel=1e-12)  # with a full border, each entry is in 2² windows
    transposed = stiefel.constrain(nn.ConvTranspose2d(8, 2, 2, stride=2).double(), "retraction")
    maps = random(4, 8, 3, 3)
    (row,) = preservation(transposed, lambda: transposed(maps).pow(2).sum()).values()
    without_bias = transposed(maps) - transposed.bias.reshape(-1, 1, 1)
    assert row.forward == pytest.approx((without_bias.norm() / maps.norm()).item(), rel=1e-12)


def test_a_layer_called_several_times_sums_its_calls() -> None:
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.Linear(5, 5).double(), "retraction", scale=0.5)
    x = random(7, 5)

    def run() -> Tensor:
        h = x
        for _ in range(4):
            h = torch.relu(layer(h))
        return h.sum()

    (row,) = preservation(layer, run).values()
    assert row.calls == 4
    assert row.forward == pytest.approx(0.5, rel=1e-12)
    assert row.backward == pytest.approx(0.5, rel=1e-12)


def hooks(model: nn.Module) -> list[int]:
    """How many there are on each module; some are the constraints' own."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_activations_in_place_branches_and_the_users_gradients_are_safe() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)).double()
    stiefel.constrain(body, "retraction")
    x = random(5, 6)
    body(x).sum().backward()
    kept, before = [p.grad.clone() for p in body.parameters()], hooks(body)
    run = lambda: (x + body(x)).pow(2).sum()  # noqa: E731
    h, y = body[0](x), body(x)
    h.retain_grad()
    mine = preservation(body, run)
    for p, grad in zip(body.parameters(), kept, strict=True):
        assert torch.equal(p.grad, grad)
    assert mine["0.weight"].backward == pytest.approx(1, rel=1e-12)  # of what is before the ReLU
    assert mine["2.weight"].forward == pytest.approx(1, rel=1e-12)
    expected = (2 * (x + y)).norm()  # ∂L/∂(output of the last layer)
    before_relu = ((2 * (x + y)) @ body[2].weight * (h > 0)).norm()
    assert mine["0.weight"].backward_total == pytest.approx((before_relu / expected).item(), rel=1e-9)
    assert hooks(body) == before


def test_hooks_go_also_after_an_error_and_what_is_not_seen_has_a_reason() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4), "rnn": nn.RNN(4, 4)})
    stiefel.constrain(model, "retraction", layers=["used", "idle", "rnn.weight_hh_l0"])
    x, before = random(3, 4, dtype=torch.float32), hooks(model)

    def fail() -> Tensor:
        model["used"](x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        preservation(model, fail)
    assert hooks(model) == before
    found = preservation(model, lambda: model["used"](input=x).sum() + model["rnn"](x)[0].sum())
    assert found["used.weight"].forward == pytest.approx(1, rel=1e-5)
    assert found["idle.weight"].forward is None
    assert "not called" in str(found["idle.weight"].reason)
    assert "RNN" in str(found["rnn.weight_hh_l0"].reason)
    with torch.no_grad():
        row = preservation(model, lambda: model["used"](x).sum())["used.weight"]
    assert (row.backward, row.reason) == (None, "no gradient has reached it")
    assert row.forward == pytest.approx(1, rel=1e-5)
    for wrong in (lambda: model["used"](x), lambda: 3.0):
        with pytest.raises(OptionError, match="has to return the loss"):
            preservation(model, wrong)  # type: ignore[arg-type]


def test_nothing_constrained_is_an_empty_answer() -> None:
    model = nn.Linear(3, 3)
    assert preservation(model, lambda: model(torch.ones(1, 3)).sum()) == {}
    assert redundancy(model) == {}


def test_redundancy_is_the_mean_cosine_of_different_filters_within_groups() -> None:
    plain = nn.ModuleDict({"one": nn.Linear(5, 1), "pair": nn.Linear(2, 2), "conv": nn.Conv2d(4, 6, 3, groups=2)})
    stiefel.constrain(plain, "unconstrained")
    w = plain["conv"].weight.detach().double().reshape(2, 3, 18)
    pairs = [(g, i, j) for g in range(2) for i in range(3) for j in range(3) if i != j]
    with torch.no_grad():
        w.copy_(random(2, 3, 18))
        plain["conv"].weight.copy_(w.reshape(6, 2, 3, 3))
        plain["pair"].weight.copy_(torch.tensor([[1.0, 0.0], [-math.cos(1.1), math.sin(1.1)]]))
    found = redundancy(plain)
    w = plain["conv"].weight.detach().double().reshape(2, 3, 18)
    expected = [abs(F.cosine_similarity(w[g, i], w[g, j], dim=0).item()) for g, i, j in pairs]
    assert found["one.weight"] is None
    assert found["pair.weight"] == pytest.approx(math.cos(1.1), rel=1e-6)
    assert found["conv.weight"] == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    held = nn.ModuleDict({"wide": nn.Linear(9, 4), "tall": nn.Linear(2, 3), "in_groups": nn.Linear(4, 8)}).double()
    stiefel.constrain(held, "retraction", layers=["wide", "tall"], scale=3.0)
    stiefel.constrain(held, "retraction", layers=["in_groups"], group_size=4)
    found = redundancy(held)
    assert found["wide.weight"] == pytest.approx(0, abs=1e-12)
    assert found["tall.weight"] is not None
    assert found["tall.weight"] > 0.1  # three filters of length two cannot be orthogonal
    assert found["in_groups.weight"] is not None
    assert found["in_groups.weight"] > 0.01  # orthogonal within groups, not between


# --- cost ---


def test_the_cost_of_a_step_on_a_cpu_has_nulls_with_their_reason() -> None:
    a = random(20, 20)
    found = step_cost(lambda: L.qr(a @ a), CPU, warmup=1, repeats=5)
    assert set(found) == {
        "seconds_per_step",
        "matmul_flops",
        "factorization_flops",
        "operators",
        "flops_reason",
        "gpu_peak_bytes",
        "gpu_reserved_bytes",
        "gpu_energy_joules",
        "gpu_reason",
        "peak_resident_bytes",
    }
    assert found["matmul_flops"] == 2 * 20**3
    assert found["factorization_flops"] == round(8 * 20**3 / 3)
    assert found["operators"] == 2
    assert found["gpu_peak_bytes"] is found["gpu_energy_joules"] is None
    assert "CUDA" in found["gpu_reason"]
    assert found["seconds_per_step"]["n"] == 5
    assert found["peak_resident_bytes"] > 10**7


def test_a_step_is_named_once_by_its_clock() -> None:
    clock = StepClock(CPU)
    for _ in range(3):
        with clock:
            pass
    clock.discard()
    assert len(clock.seconds()) == 2
    assert len(clock.drain()) == 2
    assert clock.drain() == clock.seconds() == []
    spreads = interleaved({"a": lambda: None, "b": lambda: None}, CPU, warmup=0, repeats=4)
    assert {s.n for s in spreads.values()} == {4}


class _FakeGpu:
    """Enough of torch.cuda and pynvml to run what a GPU runs; its board uses 50 W."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.peak, self.fails = 0.0, 0, False
        nvml = types.ModuleType("pynvml")
        nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
        nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid  # type: ignore[attr-defined]
        nvml.nvmlDeviceGetTotalEnergyConsumption = self.energy  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "peak", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * self.peak)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def energy(self, handle: str) -> int:
        assert handle == "GPU-abc"
        if self.fails:
            raise RuntimeError("not supported")
        return round(1e3 * 50 * self.now)

    def step(self) -> None:
        self.now += 0.25
        self.peak += 100


def test_energy_is_the_counters_difference_over_the_steps_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, device = _FakeGpu(monkeypatch), torch.device("cuda", 0)
    found = gpu_cost(device, gpu.step, seconds=3.0)
    assert found == {
        "gpu_peak_bytes": 100,
        "gpu_reserved_bytes": 200,
        "gpu_energy_joules": pytest.approx(50 * 0.25),
        "gpu_reason": None,
    }
    meter = EnergyMeter(device)
    gpu.step()
    assert meter.joules() == pytest.approx(12.5)
    gpu.fails = True
    assert meter.joules() is None
    assert meter.reason == "no energy reading: RuntimeError: not supported"
    found = gpu_cost(device, gpu.step)
    assert (found["gpu_peak_bytes"], found["gpu_energy_joules"]) == (100, None)
    assert "not supported" in found["gpu_reason"]


def test_without_the_module_of_unix_the_resident_size_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_resident_bytes() is None


def test_the_environment_asks_git_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = environment.environment(CPU)
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    assert environment.environment(CPU) == first


def test_measuring_leaves_a_model_free_to_be_copied() -> None:
    model = stiefel.constrain(nn.Linear(4, 4), "own")
    preservation(model, lambda: model(torch.ones(2, 4)).sum())
    copy.deepcopy(model)
