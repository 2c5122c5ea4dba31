"""Weights computed together when a forward pass begins: the same numbers, in every way that a model is used."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import stiefel
from stiefel.attach import prefetch
from stiefel.attach.prefetch import stop_prefetch
from stiefel.attach.proxy import prefetched
from stiefel.constraint import Reparameterization
from stiefel.methods import method_class

MAPS = [name for name in stiefel.available() if issubclass(method_class(name), Reparameterization)]
BATCHED_AT = 48
"""Outputs of a layer at which three of them together are large enough for the solver that works by products."""


class Block(nn.Module):
    """Two equal layers, a convolution and its twin, and a branch that only some passes use."""

    def __init__(self, width: int = BATCHED_AT) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Linear(width, width) for _ in range(3))
        self.narrow = nn.Linear(width, 5)
        self.c, self.d = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :32].reshape(-1, 2, 4, 4)
        return self.narrow(torch.tanh(self.b(torch.tanh(self.a(x))))).sum(1) + (self.c(image) * self.d(image)).mean(
            (1, 2, 3)
        )


def block(method: str = "own", *, together: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Block:
    torch.manual_seed(0)
    model = stiefel.constrain(Block().to(dtype), method, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype))
    if not together:
        stop_prefetch(model)
    return model


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, BATCHED_AT, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], eps: float) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert (found[name] is None) == (g is None), name
        if g is not None:
            assert (found[name] - g).norm() <= 50 * eps * (1 + g.norm()), name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many matrices each evaluation of OWN was given."""
    seen: list[int] = []
    forward = method_class("own").forward

    def counted(self: Any, proxy: Tensor, *args: Any, **parts: Any) -> Tensor:
        seen.append(len(proxy))
        return forward(self, proxy, *args, **parts)

    monkeypatch.setattr(method_class("own"), "forward", counted)
    yield seen
    assert not prefetched._passes.stack  # whatever happened, no pass is left open


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", MAPS)
def test_together_and_one_by_one_give_the_same(method: str, dtype: torch.dtype) -> None:
    found = []
    for together in (True, False):
        model = block(method, together=together, dtype=dtype)
        loss = model(inputs(dtype=dtype)).square().sum()
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    eps = torch.finfo(dtype).eps
    assert abs(found[0][0] - found[1][0]) <= 50 * eps * (1 + abs(found[1][0]))
    assert_same(found[0][1], found[1][1], eps * 10)


@pytest.mark.parametrize("options", [{"scale": "learnable"}, {"scale": "relu"}, {"group_size": 1}, {"center": False}])
def test_options_together(options: dict[str, Any]) -> None:
    found = []
    for together in (True, False):
        model = block("own", together=together, dtype=torch.float64, layers=["a", "b", "unused"], **options)
        model(inputs(dtype=torch.float64)).square().sum().backward()
        found.append(gradients(model))
    assert_same(*found, eps=1e-14)


def trained(method: str, steps: int = 4) -> dict[str, Tensor]:
    """Weights after a few steps, from whatever the forward passes of this torch compute."""
    model = block(method, dtype=torch.float64)
    optimizer = stiefel.optimizer(model, torch.optim.SGD, lr=0.01, momentum=0.9)
    for k in range(steps):
        optimizer.zero_grad()
        model(inputs(k, torch.float64)).square().mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", MAPS)
def test_a_torch_that_does_not_tell_of_hooks_trains_alike(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.6 and 2.7 lack the private name that tells; it may go again."""
    expected = trained(method)
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    found = trained(method)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-12, msg=name)


def test_a_torch_that_does_not_tell_of_hooks_computes_per_layer(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    model = block()
    calls.clear()
    model(inputs()).sum().backward()
    assert calls == [1] * 5  # a, b, narrow, c and d; unused is not


def test_equal_layers_are_computed_in_one_call(calls: list[int]) -> None:
    model = block()
    calls.clear()
    model(inputs()).sum().backward()
    assert sorted(calls) == [1, 2, 3]  # narrow; c and d; a, b and unused


def test_a_layer_that_is_not_used_has_no_gradient() -> None:
    model = block()
    model(inputs()).sum().backward()
    assert model.unused.parametrizations.weight.original.grad is None
    assert model.a.parametrizations.weight.original.grad is not None


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(BATCHED_AT, BATCHED_AT), nn.Linear(BATCHED_AT, BATCHED_AT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x).square().sum(), self.right(x).square().sum()


def branches(together: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = stiefel.constrain(Branches(), "own", center=False)
    if not together:
        stop_prefetch(model)
    return model


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_losses_of_one_pass_may_have_backward_passes_of_their_own(order: tuple[int, int]) -> None:
    found = []
    for together in (True, False):
        model = branches(together)
        losses = model(inputs())
        for k in order:
            losses[k].backward()
        found.append(gradients(model))
    assert_same(*found, eps=1e-6)


def test_a_graph_may_be_kept_for_a_second_backward_pass() -> None:
    model = branches()
    loss = sum(model(inputs()))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same(gradients(model), {name: 2 * g for name, g in once.items() if g is not None}, 1e-6)


def test_a_step_between_two_backward_passes_is_told() -> None:
    model = branches()
    loss = sum(model(inputs()))
    loss.backward(retain_graph=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        loss.backward()


def test_second_derivatives() -> None:
    found = []
    for together in (True, False):
        model = block(together=together, dtype=torch.float64)
        wanted = [p for name, p in model.named_parameters() if "unused" not in name]
        first = torch.autograd.grad(model(inputs(dtype=torch.float64)).square().sum(), wanted, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append(gradients(model))
    assert_same(*found, eps=1e-12)


@pytest.mark.parametrize("method", MAPS)
@pytest.mark.parametrize("together", [True, False])
def test_hooks_of_proxies_see_the_gradient_once_under_create_graph(method: str, together: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    stiefel.constrain(net, method)
    if not together:
        stop_prefetch(net)
    calls: list[str] = []
    wanted = dict(net.named_parameters())
    for name, p in wanted.items():
        p.register_hook(lambda g, name=name: calls.append(name))
    loss = net(torch.randn(5, 4, dtype=torch.float64)).pow(3).sum()
    plain = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
    calls.clear()
    graph = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
    assert sorted(calls) == sorted(wanted)
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", MAPS)
def test_an_ensemble_has_the_gradients_of_its_members(method: str) -> None:
    nets = [stiefel.constrain(nn.Linear(6, 4, bias=False).double(), method) for _ in range(3)]
    x = inputs(dtype=torch.float64)[:, :6]
    # By hand: torch's stack_module_state asks for one class, and parametrizing gives each layer a class of its own.
    first = nets[0]
    parameters = {k: torch.stack([net.get_parameter(k) for net in nets]) for k, _ in first.named_parameters()}
    buffers = {k: torch.stack([net.get_buffer(k) for net in nets]) for k, _ in first.named_buffers()}

    def output(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(first, (parameters, buffers), (x,))

    found = torch.autograd.grad(vmap(output)(parameters, buffers).pow(3).sum(), list(parameters.values()))
    for i, net in enumerate(nets):
        own = torch.autograd.grad(net(x).pow(3).sum(), list(net.parameters()))
        for a, b in zip(found, own, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-10)


def test_adversarial_training_with_two_forward_passes() -> None:
    """Both passes of a discriminator, then each loss backward, and a generator's step through it."""
    found = []
    for together in (True, False):
        model = block(together=together)
        fake = inputs(1).requires_grad_()
        real_loss, fake_loss = model(inputs(0)).mean(), -model(fake.detach()).mean()
        real_loss.backward()
        fake_loss.backward()
        model(fake).mean().backward()
        found.append({**gradients(model), "fake": fake.grad})
    assert_same(*found, eps=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_gradient_checkpointing(reentrant: bool, whole: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(BATCHED_AT, BATCHED_AT), nn.Linear(BATCHED_AT, BATCHED_AT)
            self.active = not whole

        def part(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=reentrant) if self.active else self.part(x)

    found = []
    for use in (True, False):
        torch.manual_seed(0)
        model = stiefel.constrain(Checkpointed(), "own", center=False)
        model.active = use and not whole
        x = inputs().requires_grad_()
        output = checkpoint(model, x, use_reentrant=reentrant) if use and whole else model(x)
        output.square().sum().backward()
        found.append(gradients(model))
    assert_same(*found, eps=1e-6)


def test_a_part_called_on_its_own(calls: list[int]) -> None:
    model = block()
    calls.clear()
    model.a(inputs()).sum().backward()
    assert calls == [1]
    assert model.b.parametrizations.weight.original.grad is None


def test_a_pass_that_fails_leaves_nothing_behind(calls: list[int]) -> None:
    model = block()
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert not prefetched._passes.stack
    model(inputs()).sum().backward()


def test_nested_roots_compute_once(calls: list[int]) -> None:
    outer = nn.Sequential(nn.Linear(BATCHED_AT, BATCHED_AT), block())
    stiefel.constrain(outer, "own", layers=["0"], center=False)
    calls.clear()
    outer(inputs()).sum().backward()
    assert sum(calls) == 1 + 6


def test_a_cell_in_a_loop_is_computed_once(calls: list[int]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 16)
            for k in range(x.shape[1]):
                h = self.cell(x[:, k], h)
            return h

    torch.manual_seed(0)
    model = stiefel.constrain(Loop(), "own", layers=["cell.weight_hh"], center=False)
    alone = copy.deepcopy(model)
    stop_prefetch(alone)
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    calls.clear()
    model(x).square().sum().backward()
    assert calls == [1]
    alone(x).square().sum().backward()
    assert len(calls) == 21
    assert_same(gradients(model), gradients(alone), 1e-6)


@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(cls: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cls(4, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    found = []
    for together in (True, False):
        torch.manual_seed(0)
        model = stiefel.constrain(Wrapped(), "own", layers=["rnn.weight_hh_l0"], center=False)
        if not together:
            stop_prefetch(model)
        model(torch.ones(2, 5, 4)).square().sum().backward()
        found.append(gradients(model))
        copy.deepcopy(model)
    assert_same(*found, eps=1e-6)


def test_copies_carry_no_prefetched_weights() -> None:
    model = block()
    model(inputs()).sum()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.a.parametrizations.weight.original.mul_(torch.arange(1.0, BATCHED_AT + 1)[:, None])
    model(inputs()).square().sum().backward()
    twin(inputs()).square().sum().backward()
    alone = copy.deepcopy(twin)
    stop_prefetch(alone)
    alone.zero_grad()
    alone(inputs()).square().sum().backward()
    assert_same(gradients(twin), gradients(alone), 1e-5)


def test_threads_do_not_see_each_other() -> None:
    model = block()
    expected = model(inputs()).detach()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                out = model(inputs())
                torch.autograd.grad(out.sum(), [model.a.bias])
                torch.testing.assert_close(out.detach(), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_transforms_go_one_by_one(calls: list[int]) -> None:
    model = block(dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = inputs(dtype=torch.float64)

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, (row[None],)).sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(per_sample[name].sum(0), p.grad, rtol=1e-9, atol=1e-10)


def test_fast_weights_that_are_no_leaves() -> None:
    model = block(dtype=torch.float64)
    factor = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    fast = {name: factor * p for name, p in model.named_parameters()}
    functional_call(model, fast, (inputs(dtype=torch.float64),)).sum().backward()
    assert factor.grad is not None
    assert factor.grad.isfinite()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # by torch._dynamo itself
def test_compiled_models() -> None:
    found = []
    for compiled in (False, True):
        model = block()
        run: Callable[..., Tensor] = torch.compile(model, backend="aot_eager") if compiled else model
        run(inputs()).square().sum().backward()
        found.append(gradients(model))
    assert_same(*found, eps=1e-5)


def test_torchs_cache_still_works(calls: list[int]) -> None:
    model, plain = block(), block()
    with parametrize.cached():
        model(inputs()).sum().backward()
    plain(inputs()).sum().backward()
    assert_same(gradients(model), gradients(plain), 1e-6)


def test_frozen_layers_and_late_replacements() -> None:
    model = block()
    model.a.requires_grad_(False)
    model.a.parametrizations.weight.requires_grad_(False)
    model.b = nn.Linear(BATCHED_AT, BATCHED_AT)
    model(inputs()).sum().backward()
    assert model.a.parametrizations.weight.original.grad is None
    assert model.b.weight.grad is not None


def test_release_takes_the_hooks_off() -> None:
    model = block()
    out = model(inputs()).detach()
    stiefel.release(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    torch.testing.assert_close(model(inputs()).detach(), out)


def test_data_parallel_with_an_unused_branch(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = block()
        alone = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            parallel(inputs()).sum().backward()
            alone(inputs()).sum().backward()
        found, expected = gradients(model), gradients(alone)
        for name, g in expected.items():  # the reducer itself turns an unused gradient into zeros
            if g is not None:
                torch.testing.assert_close(found[name], g)
    finally:
        dist.destroy_process_group()


def test_a_part_without_the_batch_dimension_is_refused() -> None:
    cls = method_class("cayley")

    class Shared(cls):  # type: ignore[misc, valid-type]
        def start(self, x: Tensor, layout: Any) -> Any:
            return x, {"temperature": torch.ones(())}

    with pytest.raises(stiefel.StiefelError, match="'temperature' of shape"):
        stiefel.constrain(nn.Linear(4, 3), Shared())


class Inner(nn.Module):
    """A pass in which something happens to the layer before it is used; ``happen`` is what."""

    def __init__(self, happen: Callable[["Inner"], object]) -> None:
        super().__init__()
        self.layer, self.happen = nn.Linear(BATCHED_AT, BATCHED_AT), happen

    def forward(self, x: Tensor) -> Tensor:
        self.happen(self)
        return self.layer(x)


def fused_steps(model: Inner) -> None:
    optimizer = stiefel.optimizer(model.layer, torch.optim.Adam, lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        (model.layer(inputs(2)) ** 3).sum().backward()
        optimizer.step()
    model.zero_grad()


EVENTS: dict[str, Callable[[Inner], object]] = {
    "fused steps": fused_steps,  # which no tensor's version shows
    "gain": lambda m: nn.init.constant_(m.layer.parametrizations.weight[0].gain, 2.0),
    "frozen": lambda m: m.layer.requires_grad_(False),
}


@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_within_a_pass_is_seen(event: str) -> None:
    found = []
    for together in (True, False):
        torch.manual_seed(0)
        model = stiefel.constrain(Inner(EVENTS[event]), "own", scale="learnable", center=False)
        if not together:
            stop_prefetch(model)
        output = model(inputs())
        if output.requires_grad:
            output.square().sum().backward()
        found.append({**gradients(model), "output": output.detach()})
    assert_same(*found, eps=1e-6)


def test_an_interrupted_pass_does_not_freeze_the_layer() -> None:
    def interrupt(model: Inner) -> None:
        raise KeyboardInterrupt

    model = stiefel.constrain(Inner(interrupt), "own", center=False)
    with pytest.raises(KeyboardInterrupt):  # for which torch runs no hooks
        model(inputs())
    try:
        before = model.layer.weight.detach().clone()
        fused_steps(model)
        assert (model.layer.weight.detach() - before).norm() > 0.1
    finally:
        prefetched._passes.stack.clear()


@pytest.mark.parametrize("method", ["own", "weight_norm", "cayley", "pogo", "riemannian", "soft"])
@pytest.mark.parametrize("scale", [1.0, "learnable"])
def test_replicas_of_data_parallel(method: str, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nn.DataParallel makes of a module: shallow copies whose parameters are plain attributes."""
    if method == "weight_norm" and scale == "learnable":
        pytest.skip("weight_norm has a gain of its own")
    if scale == "learnable" and stiefel.get(method).place != "forward":
        pytest.skip("step methods and penalties have no gain")
    layers = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
    model = stiefel.constrain(layers, method, scale=scale, exclude=["1"])

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else replica(child)
        for name, p in module._parameters.items():
            setattr(twin, name, None if p is None else p * 1.0)
        return twin

    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    together = []
    bucket = prefetch.Bucket
    monkeypatch.setattr(prefetch, "Bucket", lambda members: together.append(len(members)) or bucket(members))
    torch.testing.assert_close(replica(model)(x), model(x))
    if stiefel.get(method).place == "forward":
        assert together == [2, 2]  # in the replica as in the model
    with torch.no_grad():
        torch.testing.assert_close(replica(model)(x), model(x))
