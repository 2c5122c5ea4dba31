"""Weight decay that would move a weight along its set: kept off by parameter groups, and told of where it is not."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import stiefel
from stiefel.attach.weights import constrained_weights


def model(method: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    return stiefel.constrain(net, method, layers=["0", "2"], **options)


def held(net: nn.Module) -> set[int]:
    return {id(w.parameter) for w in constrained_weights(net)}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.ASGD])
@pytest.mark.parametrize("method", ["retraction", "landing", "riemannian", "cayley", "matrix_exp", "householder"])
def test_weights_that_decay_would_move_are_in_a_group_without_it(method: str, cls: type) -> None:
    net = model(method)
    try:
        optimizer = stiefel.optimizer(net, cls, lr=0.1, weight_decay=0.3)
    except stiefel.OptimizerError:
        pytest.skip("geoopt has no Riemannian form of it")
    free, apart = optimizer.param_groups
    assert {id(p) for p in apart["params"]} == held(net)
    assert apart["weight_decay"] == 0
    assert apart.get("lambd", 0) == 0
    assert free["weight_decay"] == 0.3
    same = set(free) - {"params", "weight_decay", "lambd"}
    assert {k: free[k] for k in same} == {k: apart[k] for k in same}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters()))
    step(net, optimizer)


@pytest.mark.parametrize("method", ["soft", "unconstrained", "weight_norm", "spectral_norm"])
def test_weights_that_are_not_held_decay_as_any_other(method: str) -> None:
    optimizer = stiefel.optimizer(model(method), torch.optim.Adam, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3]


@pytest.mark.parametrize(
    ("cls", "hyper", "groups"),
    [
        (torch.optim.AdamW, {"lr": 0.1}, 1),
        (torch.optim.Adam, {"lr": 0.1, "decoupled_weight_decay": True}, 1),
        (torch.optim.SGD, {"lr": 0.1}, 1),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}, 1),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 2),  # lr·λ is beyond (1 − √μ)²: the proxy would change its sign
        (torch.optim.Adam, {"lr": 0.1}, 2),
        (torch.optim.RMSprop, {"lr": 0.1}, 2),
        (torch.optim.Adagrad, {"lr": 0.1}, 2),
    ],
)
@pytest.mark.parametrize("method", ["own", "oni", "bjorck"])
def test_a_proxy_whose_length_is_free_keeps_the_decay_that_only_rescales_it(
    method: str, cls: type, hyper: dict[str, Any], groups: int
) -> None:
    net = model(method)
    optimizer = stiefel.optimizer(net, cls, **{"weight_decay": 0.3, **hyper})
    assert len(optimizer.param_groups) == groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimizer)


def test_a_learnable_scale_keeps_its_decay() -> None:
    net = model("cayley", scale="learnable")
    optimizer = stiefel.optimizer(net, torch.optim.AdamW, weight_decay=0.3)
    gains = {id(p) for name, p in net.named_parameters() if name.endswith("gain")}
    assert len(gains) == 2
    assert gains <= {id(p) for p in optimizer.param_groups[0]["params"]}


def test_groups_of_the_user_are_parted_one_by_one() -> None:
    net = model("retraction")
    groups = [
        {"params": [("a", net[0].weight), ("b", net[0].bias)], "lr": 0.1, "weight_decay": 0.2},
        {"params": [("c", net[2].weight)], "lr": 0.2},
        {"params": [("d", net[2].bias)], "weight_decay": 0.0},
    ]
    optimizer = stiefel.optimizer(net, torch.optim.AdamW, groups, lr=0.3, weight_decay=0.4)
    found = [(g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(["b"], 0.1, 0.2), (["c"], 0.2, 0), (["d"], 0.3, 0.0), (["a"], 0.1, 0)]


def test_without_decay_there_is_one_group() -> None:
    assert len(stiefel.optimizer(model("retraction"), torch.optim.Adam).param_groups) == 1


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, 0.01 * (i + 1))
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("first", "second"), [("soft", "retraction"), ("retraction", "soft"), ("pogo", "retraction")])
@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_moves_between_groups_that_are_parted_and_not(first, second, several):
    def made(net: nn.Module, decay: float) -> torch.optim.Optimizer:
        parameters = list(net.parameters())
        groups = [{"params": parameters[:3], "lr": 0.2}, {"params": parameters[3:]}] if several else parameters
        return stiefel.optimizer(net, torch.optim.AdamW, groups, lr=0.1, weight_decay=decay)

    a, b = model(first), model(second)
    one, two = stepped(a, made(a, 0.3)), made(b, 0.4)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # Of equal gradients where no tangent part is taken; of the same parameter in any case.
        assert two.state[q]["exp_avg"].shape == q.shape
        assert torch.equal(two.state[q]["exp_avg"], one.state[p]["exp_avg"])
    of = {id(p): group for group in two.param_groups for p in group["params"]}
    for i, p in enumerate(b.parameters()):
        assert of[id(p)]["lr"] == (0.2 if several and i < 3 else 0.1)
    assert of[id(b[0].bias)]["weight_decay"] == (0.3 if first == "pogo" else 0.4)  # its own, where the groups differ
    assert (of[id(b[0].weight)]["weight_decay"] == 0) == (second != "soft")
    stepped(b, two)


def test_a_checkpoint_of_a_plain_optimizer_moves_into_parted_groups() -> None:
    plain, net = model("unconstrained"), model("retraction")
    before = stepped(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    optimizer = stiefel.optimizer(net, torch.optim.AdamW, lr=0.1)
    optimizer.load_state_dict(before.state_dict())
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(optimizer.state[q]["exp_avg"], before.state[p]["exp_avg"])


@pytest.mark.parametrize("method", ["soft", "retraction", "riemannian"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_checkpoint_of_a_copied_optimizer_can_be_loaded_and_a_copy_can_load_one(method: str, how: str) -> None:
    """Copies of optimizers lose their hooks, by which a checkpoint tells how its groups were parted."""
    net = model(method)
    first = stiefel.optimizer(net, torch.optim.Adam, lr=0.1, weight_decay=0.1)
    step(net, first)
    copied = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    for source, target in ((copied, first), (first, copied)):
        target.load_state_dict(source.state_dict())
        assert [g["weight_decay"] for g in target.param_groups] == [g["weight_decay"] for g in first.param_groups]
    step(net, first)


def test_a_checkpoint_of_other_parameters_says_why() -> None:
    net = model("retraction")
    optimizer = stiefel.optimizer(net, torch.optim.AdamW, lr=0.1)
    other = torch.optim.AdamW(list(net.parameters())[:3], lr=0.1)
    with pytest.raises(stiefel.OptimizerError, match="has 3 parameters in 1 groups, and the optimizer has 8 in 1"):
        optimizer.load_state_dict(other.state_dict())
    proxied = model("own")
    saved = stepped(proxied, stiefel.optimizer(proxied, torch.optim.AdamW, lr=0.1))
    with pytest.raises(stiefel.OptimizerError, match=r"exp_avg .* has the shape .*come in another order"):
        optimizer.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_decay_that_a_checkpoint_brings_back_is_refused_before_a_weight_moves() -> None:
    net = stiefel.constrain(nn.Linear(6, 4, bias=False), "retraction")
    optimizer = stiefel.optimizer(net, torch.optim.AdamW, lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    before = net.weight.detach().clone()
    net.weight.square().sum().backward()
    with pytest.raises(stiefel.OptimizerError, match=r"weight_decay=0\.3 of LiftedAdamW would move weight 'weight'"):
        optimizer.step()
    assert torch.equal(net.weight, before)


def test_a_plain_optimizer_that_would_turn_a_proxy_warns_once() -> None:
    net = model("cayley")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(net, optimizer)
        step(net, optimizer)
    for name, warning in zip("02", told, strict=True):  # once for each weight
        assert f"weight_decay=0.01 of AdamW would move weight '{name}.weight'" in str(warning.message)


def test_a_heavy_ball_beyond_critical_damping_would_turn_the_weight() -> None:
    """The reason for the limit lr·λ < (1 − √μ)²: at 0.1, 0.1 and 0.9 the proxy swings through zero."""
    for decay, turns in ((0.1, True), (0.02, False)):
        layer = stiefel.constrain(nn.Linear(6, 4, bias=False, dtype=torch.float64), "own", center=False)
        start = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        turned = False
        for _ in range(60):
            optimizer.zero_grad()
            (0 * layer.weight).sum().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            turned |= bool((layer.weight * start).sum() < 0)
        assert turned is turns


def test_a_rate_that_is_a_tensor_belongs_to_its_group_alone() -> None:
    """A loop over groups that changes each rate in place would change a shared one twice."""
    net = model("retraction")
    optimizer = stiefel.optimizer(net, torch.optim.Adam, lr=torch.tensor(0.1), weight_decay=0.1)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        group["lr"].mul_(0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", ["own", "retraction", "riemannian", "soft"])
def test_a_checkpoint_with_groups_that_were_added_later_loads_where_they_are_given_at_once(method, cls):
    if method == "riemannian" and cls is torch.optim.AdamW:
        cls = torch.optim.Adam

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(net[3].parameters()), "weight_decay": 0}, {"params": list(net[:3].parameters())}]

    net, again = model(method), model(method)
    optimizer = stiefel.optimizer(net, cls, groups(net)[:1], lr=0.1)
    step(net, optimizer)
    optimizer.add_param_group({**groups(net)[1], "weight_decay": 0})
    step(net, optimizer)
    other = stiefel.optimizer(again, cls, groups(again), lr=0.1, weight_decay=0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(net.state_dict())
    for each, by in ((net, optimizer), (again, other)):
        step(each, by, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
