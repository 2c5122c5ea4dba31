"""What a weight is asked to be beyond orthogonal: a determinant's sign, axes read otherwise, members of lists."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import stiefel

METHODS = [m for m in stiefel.available() if not m.startswith("test_")]
HELD = [m for m in METHODS if stiefel.get(m).claim is not None]
FREE = [m for m in METHODS if m not in HELD]
DOUBLE = torch.float64


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rotations(count: int, n: int, sign: int, seed: int = 0) -> Tensor:
    q = torch.linalg.qr(gaussian(count, n, n, seed=seed))[0]
    q[:, 0] *= (torch.linalg.det(q).sign() * sign)[:, None]
    return q


def signs(w: Tensor) -> set[float]:
    return set(torch.linalg.det(w.detach()).sign().tolist())


# --- determinants ---


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", HELD)
def test_training_starts_at_the_nearest_matrix_of_the_sign_asked_for(method, sign):
    """Against scipy's solution of Wahba's problem, the nearest rotation."""
    from scipy.spatial.transform import Rotation

    given = gaussian(30, 3, 3)
    net = stiefel.constrain(nn.ParameterDict({"R": given.clone()}), method, determinant=sign)
    assert signs(net["R"]) == {sign}
    for found, v in zip(net["R"].detach(), given, strict=True):
        # align_vectors finds the rotation R nearest to Σ aᵢ bᵢᵀ; a reflection is −1 times a rotation of −V here.
        nearest = Rotation.align_vectors((sign * v).T.numpy(), torch.eye(3, dtype=DOUBLE).numpy())[0].as_matrix()
        torch.testing.assert_close(found, sign * torch.from_numpy(nearest.copy()), rtol=0, atol=1e-9)


RATES = (0.03, 0.3, 3.0, 30.0)
OPTIMIZERS = {
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD": (torch.optim.SGD, {}),
    "Adam": (torch.optim.Adam, {}),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("choice", OPTIMIZERS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", HELD)
def test_no_step_of_any_length_changes_the_sign_that_was_asked_for(method, sign, choice):
    cls, hyper = OPTIMIZERS[choice]
    target = rotations(20, 3, sign, seed=1)
    for lr in RATES:
        net = stiefel.constrain(nn.ParameterDict({"R": gaussian(20, 3, 3)}), method, determinant=sign)
        optimizer = stiefel.optimizer(net, cls, lr=lr, **hyper)
        for step in range(25):
            optimizer.zero_grad()
            (net["R"] - target).square().sum().backward()
            try:
                optimizer.step()
            except stiefel.DivergenceError:
                break
            assert signs(net["R"]) == {sign}, f"rate {lr:g}, step {step}"


@pytest.mark.parametrize("method", [m for m in HELD if not stiefel.get(m).caveat and not stiefel.get(m).step_length])
def test_rotations_are_found_from_starts_in_the_other_component(method):
    """Without the option half of the matrices stay where the loss cannot be small."""
    target = rotations(20, 3, 1, seed=1)
    net = stiefel.constrain(nn.ParameterDict({"R": gaussian(20, 3, 3)}), method, determinant=1)
    found = stiefel.minimize(net, lambda: (net["R"] - target).square().sum())
    assert found.converged, found
    assert found.loss < 1e-12
    assert signs(net["R"]) == {1.0}


def test_the_sign_survives_checkpoints_conversion_and_project():
    net = stiefel.constrain(nn.ParameterDict({"R": gaussian(5, 3, 3)}), "own", determinant=1)
    other = stiefel.constrain(nn.ParameterDict({"R": gaussian(5, 3, 3, seed=1)}), "retraction", determinant=1)
    other.load_state_dict(net.state_dict())
    assert signs(other["R"]) == {1.0}
    with torch.no_grad():
        other["R"][:, 0] *= -1
    assert signs(stiefel.project(other)["R"]) == {1.0}
    plain = {"R": rotations(5, 3, -1)}
    with pytest.warns(UserWarning, match="moved"):
        net.load_state_dict(plain)
    assert signs(net["R"]) == {1.0}
    assert signs(stiefel.release(net)["R"]) == {1.0}


@pytest.mark.parametrize("method", HELD)
def test_a_determinant_needs_square_real_matrices(method):
    with pytest.raises(stiefel.LayoutError, match="needs square matrices"):
        stiefel.constrain(nn.Linear(4, 3), method, determinant=1)
    with pytest.raises(stiefel.WeightError, match="complex64"):
        stiefel.constrain(nn.ParameterDict({"U": torch.eye(3, dtype=torch.complex64)}), method, determinant=1)
    for wrong in (0, 2, True, 1.0, "+"):
        with pytest.raises(stiefel.OptionError, match="determinant"):
            stiefel.get(method, determinant=wrong)


@pytest.mark.parametrize("method", FREE)
def test_methods_that_hold_no_set_refuse_a_determinant(method):
    with pytest.raises(stiefel.OptionError, match="does not keep a determinant's sign"):
        stiefel.get(method, determinant=1)


def test_the_reflection_is_differentiable():
    """Gradients of the nearest rotation against finite differences, on both sides of a singular matrix."""
    net = stiefel.constrain(nn.ParameterDict({"R": rotations(4, 3, 1)}), "own", determinant=1)
    parametrization = net.parametrizations.R[0]
    for scale in (1.0, -1.0):  # −V of odd order has the other sign
        v = (scale * gaussian(4, 3, 3, seed=7)).requires_grad_()
        assert torch.autograd.gradcheck(parametrization, (v,))


# --- axes ---

READINGS = {
    "ibo": ((12, 3, 5), lambda w, h: w[:, h].T),  # (model, heads, head): head rows per head
    "bio": ((3, 12, 5), lambda w, h: w[h].T),
    "boi": ((3, 5, 12), lambda w, h: w[h]),
    "iio": ((4, 4, 3), lambda w, h: w.reshape(16, 3).T),
    "oib": ((5, 12, 2), lambda w, h: w[:, :, h]),
    "ioi": ((4, 3, 5), lambda w, h: w.permute(1, 0, 2).reshape(3, 20)),
    "oiob": ((2, 9, 3, 2), lambda w, h: w[..., h].permute(0, 2, 1).reshape(6, 9)),
    "io": ((4, 9), lambda w, h: w),  # columns would be too many: rows
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("axes", READINGS)
@pytest.mark.parametrize("method", METHODS)
def test_axes_say_which_dimensions_are_the_matrix(method, axes):
    shape, read = READINGS[axes]
    net = stiefel.constrain(nn.ParameterDict({"W": gaussian(*shape)}), method, axes=axes)
    assert net["W"].shape == shape
    optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        ((net["W"] - gaussian(*shape, seed=2)).square().sum() + stiefel.penalty(net)).backward()
        optimizer.step()
    count = [size for size, axis in zip(shape, axes, strict=True) if axis == "b"]
    if stiefel.get(method).feasible:
        for h in range(count[0] if count else 1):
            x = read(net["W"].detach(), h)
            p = x.shape[0]
            torch.testing.assert_close(x @ x.T, torch.eye(p, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert f"of axes {axes}" in str(stiefel.report(net))
    again = stiefel.constrain(nn.ParameterDict({"W": gaussian(*shape, seed=5)}), method, axes=axes)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again["W"], net["W"])
    assert stiefel.release(net)["W"].shape == shape


def test_unit_columns_of_a_tall_weight():
    net = stiefel.constrain(nn.ParameterDict({"W": gaussian(50, 8)}), "own", axes="io", group_size=1)
    torch.testing.assert_close(net["W"].norm(dim=0), torch.ones(8, dtype=DOUBLE))


@pytest.mark.parametrize("axes", ["oi", "ooo", "bbi", "oix", "oiib"])
def test_axes_that_do_not_fit_are_refused(axes):
    with pytest.raises(stiefel.LayoutError, match=r"weight 'W': axes=.* expected 3 letters"):
        stiefel.constrain(nn.ParameterDict({"W": gaussian(3, 4, 5)}), "own", axes=axes)


# --- containers and bare tensors ---


@pytest.mark.parametrize("method", ["own", "retraction"])
def test_lists_and_dictionaries_of_parameters_are_named_as_a_whole(method):
    model = nn.Module()
    model.gates = nn.ParameterList([gaussian(4, 4, seed=i) for i in range(5)])
    model.more = nn.ParameterDict({"a": gaussian(3, 6), "b": gaussian(6, 3)})
    stiefel.constrain(model, method, layers=["gates", "more"], exclude=["more.b"])
    assert [row.name for row in stiefel.report(model).rows] == [*(f"gates.{i}" for i in range(5)), "more.a"]
    alone = stiefel.constrain(nn.ParameterList([gaussian(4, 4)]), method)
    assert [row.name for row in stiefel.report(alone).rows] == ["0"]


@pytest.mark.parametrize("given", [torch.eye(3), nn.Parameter(torch.eye(3)), [torch.eye(3)], "model"])
def test_what_is_no_module_is_refused_with_the_lines_to_write(given):
    with pytest.raises(stiefel.SelectionError, match=r'nn\.ParameterDict\(\{"W": tensor\}\)'):
        stiefel.constrain(given, "own")
    lines: dict[str, object] = {"nn": nn, "stiefel": stiefel, "tensor": torch.eye(3)}
    with pytest.raises(stiefel.SelectionError) as error:
        stiefel.constrain(given, "own")
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), lines)
    assert stiefel.report(lines["w"]).worst < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_with_sparse_gradients_trains_or_is_refused_by_name(method):
    layer = nn.Embedding(20, 32, sparse=True)
    if stiefel.get(method).place == "forward":
        with pytest.raises(stiefel.WeightError, match=r"'weight' is of Embedding\(sparse=True\).*sparse=False"):
            stiefel.constrain(layer, method, layers=["weight"])
        return
    stiefel.constrain(layer, method, layers=["weight"])
    optimizer = stiefel.optimizer(layer, torch.optim.SGD, lr=0.1)
    (layer(torch.tensor([1, 2])).square().sum() + stiefel.penalty(layer)).backward()
    with pytest.raises(stiefel.OptimizerError, match="sparse") if method == "riemannian" else nullcontext():
        optimizer.step()
    assert stiefel.report(layer).worst < 1e-5 or not stiefel.get(method).feasible
