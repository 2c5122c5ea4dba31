"""Weights of reparameterizations at rest: computed once, and anew whenever their proxy may have changed."""

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stiefel


def layer(method: str = "own", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return stiefel.constrain(nn.Sequential(nn.Linear(12, 8)), method, **options)


def proxy(model: nn.Module) -> Tensor:
    return model[0].parametrizations.weight.original


def step(model: nn.Module, cls: Any = torch.optim.SGD, **hyper: Any) -> None:
    """One optimizer step, on gradients that do not touch the weight."""
    optimizer = stiefel.optimizer(model, cls, lr=0.1, **hyper)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def refreshed(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return stiefel.refresh(model)[0].weight


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "SGD": step,
    "fused Adam": lambda m: step(m, torch.optim.Adam, fused=True),
    "foreach Adam": lambda m: step(m, torch.optim.Adam, foreach=True),
    "in place": lambda m: torch.nn.init.normal_(proxy(m)),
    "load": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True),
    "new data": lambda m: setattr(proxy(m), "data", torch.randn(8, 12)),
    "assignment": lambda m: setattr(m[0], "weight", torch.randn(8, 12)),
    "data and train": lambda m: (proxy(m).data.normal_(), m.train()),
    "data and eval": lambda m: (proxy(m).data.normal_(), m.eval()),
    "data and refresh": lambda m: (proxy(m).data.normal_(), stiefel.refresh(m)),
    "data and to": lambda m: (proxy(m).data.normal_(), m.to(torch.float64), m.to(torch.float32)),
    "vector_to_parameters": lambda m: torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters())), m.parameters()
    ),
}


@pytest.mark.parametrize("scale", [1.0, "learnable"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_proxy_is_seen(change: str, scale: Any) -> None:
    model = layer(scale=scale).eval()
    with torch.no_grad():
        before = model[0].weight
        assert model[0].weight is before
    CHANGES[change](model)
    with torch.no_grad():
        after = model[0].weight
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, refreshed(model), rtol=0, atol=0)


def test_a_change_of_a_part_is_seen() -> None:
    model = layer("weight_norm").eval()
    with torch.no_grad():
        before = model[0].weight
        model[0].parametrizations.weight[0].parts.gain.mul_(2)
        torch.testing.assert_close(model[0].weight, 2 * before)


def test_an_edit_of_the_kept_weight_does_not_stay() -> None:
    model = layer().eval()
    with torch.no_grad():
        before = model[0].weight.clone()
        model[0].weight.zero_()
        torch.testing.assert_close(model[0].weight, before, rtol=0, atol=0)


def test_an_access_with_gradients_computes_anew_and_has_a_graph() -> None:
    model = layer()
    with torch.no_grad():
        kept = model[0].weight
    weight = model[0].weight
    assert weight.requires_grad
    assert weight is not kept
    weight.sum().backward()
    with torch.no_grad():
        assert model[0].weight is not kept


def test_frozen_weights_are_kept_with_gradients_on_too() -> None:
    model = layer()
    model.requires_grad_(False)
    assert model[0].weight is model[0].weight
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_inference_mode_does_not_leak() -> None:
    model = layer().eval()
    model.requires_grad_(False)
    with torch.inference_mode():
        inside = model[0].weight
        assert model[0].weight is inside
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()  # a kept inference tensor cannot be saved for it
    assert x.grad is not None


def test_reports_measure_what_is_there() -> None:
    model = layer("weight_norm")
    with torch.no_grad():
        model[0].weight  # noqa: B018
    proxy(model).data[0] = proxy(model).data[1]
    assert stiefel.report(model).worst > 0.1


def test_copies_and_releases_do_not_share_a_kept_weight() -> None:
    model = layer().eval()
    with torch.no_grad():
        kept = model[0].weight
    twin = copy.deepcopy(model)
    assert "kept" not in twin[0].parametrizations.weight[0].__dict__
    with torch.no_grad():
        assert twin[0].weight is not kept
    torch.testing.assert_close(stiefel.release(model)[0].weight.detach(), kept, rtol=0, atol=0)


def test_threads_of_one_model_agree() -> None:
    model = layer().eval()
    with torch.no_grad():
        expected = model[0].weight
    from concurrent.futures import ThreadPoolExecutor

    def access(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(model[0].weight, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(access, range(100)))


def test_an_optimizers_own_hook_sees_the_weight_after_its_step() -> None:
    model = layer()
    optimizer = stiefel.optimizer(model, torch.optim.Adam, lr=0.1, fused=True)
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        with torch.no_grad():
            seen.append(model[0].weight)

    look()
    optimizer.register_step_post_hook(look)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(seen[1], refreshed(model), rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[0])


def test_a_model_made_in_inference_mode_is_computed_every_time() -> None:
    with torch.inference_mode():
        model = layer()
        before = model[0].weight.clone()
        proxy(model).copy_(torch.randn(8, 12))
        assert not torch.equal(model[0].weight, before)


def test_a_model_shared_with_other_processes_is_computed_every_time() -> None:
    model = layer().share_memory()
    with torch.no_grad():
        before = model[0].weight
        assert model[0].weight is not before


def test_access_is_quick() -> None:
    """Some 3.5 times a plain layer's, where computing the weight takes hundreds of it: a ratio, for machines differ."""
    kept, plain = layer().eval(), torch.nn.Sequential(torch.nn.Linear(4, 4))
    times: dict[torch.nn.Module, list[float]] = {kept: [], plain: []}
    with torch.no_grad():
        kept[0].weight  # noqa: B018
        for _ in range(40):
            for model, measured in times.items():
                start = time.thread_time()
                for _ in range(500):
                    model[0].weight  # noqa: B018
                measured.append(time.thread_time() - start)
    assert min(times[kept]) <= 10 * min(times[plain])
