"""What PyTorch offers, tried with a method in one process: right, or refused by name.

A feature is a function of a method's name. It returns whether the result is right; an error of this library's is a
refusal. ``docs/compatibility.md`` has the tables, which this file writes when it is run as a script.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from contract import METHODS, batch, mlp, train
from documents import ROOT
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import stiefel

RIGHT, REFUSED = "✓", "refused"
DOCUMENT = ROOT / "docs" / "compatibility.md"


def made(method: str, seed: int = 0, **options: Any) -> nn.Module:
    same_set = type(stiefel.get(method)).comparison
    return stiefel.constrain(mlp(seed=seed), method, **{"scale": "relu", **same_set, **options})


def on_set(method: str, model: nn.Module, tolerance: float = 1e-5) -> bool:
    return not stiefel.get(method).feasible or stiefel.report(model).worst < tolerance


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return stiefel.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)


def compiled(method: str) -> bool:
    torch._dynamo.reset()
    model, x = made(method), batch(4, 6)
    return torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def exported(method: str) -> bool:
    model, x = made(method).eval(), batch(4, 6)
    return close(torch.export.export(model, (x,)).module()(x), model(x))


def onnx(method: str) -> bool:
    torch.onnx.export(made(method).eval(), (batch(4, 6),), dynamo=True, verbose=False)
    return True


def autocast(method: str) -> bool:
    model, scaler = made(method), torch.amp.GradScaler("cpu")
    optimizer = momentum(model)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch(4, 6)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return on_set(method, model)


def half(method: str) -> bool:
    model = made(method).to(torch.bfloat16)
    model(batch(4, 6).to(torch.bfloat16)).sum().backward()
    momentum(model).step()
    return stiefel.get(method).claim is None


def resumed(method: str) -> bool:
    model, again = made(method), made(method, seed=3)
    optimizer, other = momentum(model), momentum(again)
    train(model, optimizer, batch(4, 6), steps=3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    again.load_state_dict(state)
    other.load_state_dict(optimizer_state)
    for each, by in ((model, optimizer), (again, other)):
        train(each, by, batch(4, 6), steps=2)
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def from_plain(method: str) -> bool:
    plain, model = stiefel.release(made("retraction", seed=2)), made(method)
    model.load_state_dict(plain.state_dict())
    return close(model(batch(4, 6)), plain(batch(4, 6)), 1e-4) or stiefel.get(method).claim is None


def from_another(method: str) -> bool:
    other, model = made("cayley", seed=2), made(method)
    model.load_state_dict(other.state_dict())
    return close(model(batch(4, 6)), other(batch(4, 6)), 1e-4) or stiefel.get(method).claim is None


def pretrained(method: str) -> bool:
    class Pretrained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def save_pretrained(self) -> dict[str, Tensor]:
            return dict(self.state_dict())

    model, plain = Pretrained(), Pretrained()
    stiefel.constrain(model, method)
    plain.load_state_dict(model.save_pretrained(), strict=True)
    return close(plain.body(batch(4, 6)), model.body(batch(4, 6)))


def copied(method: str) -> bool:
    model = made(method)
    pair = copy.deepcopy((model, momentum(model)))
    train(*pair, batch(4, 6), steps=2)
    optimizer = pickle.loads(pickle.dumps(momentum(model)))
    return on_set(method, pair[0]) and type(optimizer) is type(pair[1])


def called(method: str) -> bool:
    model, x = made(method), batch(4, 6)
    parameters = dict(model.named_parameters())
    found = grad(lambda p: functional_call(model, p, (x,)).square().mean())(parameters)
    model(x).square().mean().backward()
    return all(p.grad is not None and close(found[name], p.grad) for name, p in parameters.items())


def ensemble(method: str) -> bool:
    models, x = [made(method, seed) for seed in range(3)], batch(4, 6)
    parameters, buffers = stack_module_state(models)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    return close(out, torch.stack([model(x) for model in models]))


def jacobian(method: str) -> bool:
    model, x = made(method), batch(2, 6)
    found = jacrev(lambda p: functional_call(model, p, (x,)).sum(0))(dict(model.named_parameters()))
    model(x)[:, 1].sum().backward()
    return all(close(found[name][1], p.grad) for name, p in model.named_parameters() if p.grad is not None)


def checkpointed(method: str) -> bool:
    one, other, x = made(method), made(method), batch(4, 6)
    one(x).square().mean().backward()
    checkpoint(other, x, use_reentrant=False).square().mean().backward()
    return all(close(p.grad, q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def quasi_newton(method: str) -> bool:
    model, x = made(method), batch(4, 6)
    optimizer = stiefel.optimizer(model, torch.optim.LBFGS, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean() + stiefel.penalty(model)
        loss.backward()
        return loss

    before = float(closure())
    optimizer.step(closure)
    return float(closure()) < before and on_set(method, model)


class Averaging(torch.optim.SGD):
    """Exchanges parameters for their averages in ``eval()``, as ScheduleFree's optimizers do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["average"] = state.get("average", 0) + (p.detach() - state.get("average", 0)) / state["count"]
        return loss

    def train(self) -> None:
        """Nothing to put back: trained to the end."""

    def eval(self) -> None:
        """The averages."""
        with torch.no_grad():
            for p, state in self.state.items():
                p.copy_(state["average"])


def averaging(method: str) -> bool:
    model = made(method)
    optimizer: Any = stiefel.optimizer(model, Averaging, lr=0.1)
    train(model, optimizer, batch(4, 6), steps=5)
    optimizer.eval()
    return on_set(method, model)


def averaged(method: str) -> bool:
    model = made(method)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = momentum(model)
    for _ in range(3):
        train(model, optimizer, batch(4, 6), steps=1)
        average.update_parameters(model)
    return on_set(method, stiefel.project(average.module))


def pruned(method: str) -> bool:
    model = made(method)
    prune.l1_unstructured(model[2], "weight", 0.3)
    model(batch(4, 6))
    return False


def tied(method: str) -> bool:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    stiefel.constrain(model, method)
    train(model, momentum(model), batch(4, 6), steps=3)
    return torch.equal(model[0].weight, model[2].weight) and on_set(method, model)


def recurrent(method: str) -> bool:
    model = stiefel.constrain(nn.LSTM(6, 6), method, layers=["weight_hh_l0"])
    out = model(batch(4, 2, 6))[0].detach()
    twin = copy.deepcopy(model)
    return close(twin(batch(4, 2, 6))[0], out) and close(stiefel.release(twin)(batch(4, 2, 6))[0], out)


def hooked(method: str) -> bool:
    """An optimizer per parameter, which steps in the backward pass."""
    model = made(method)
    optimizers = {p: stiefel.optimizer(model, torch.optim.SGD, [p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        cross_entropy(model(batch(4, 6)), torch.tensor([0, 1, 2, 0])).backward()
    return on_set(method, model)


FEATURES: dict[str, Callable[[str], bool]] = {
    "`torch.compile(fullgraph=True)`": compiled,
    "`torch.export`": exported,
    "ONNX before `release`": onnx,
    "autocast, GradScaler, clipping": autocast,
    "`model.bfloat16()`": half,
    "resume bit for bit": resumed,
    "load a plain checkpoint": from_plain,
    "load another method's": from_another,
    "`save_pretrained`": pretrained,
    "deepcopy, pickle of optimizers": copied,
    "`functional_call`, `grad`": called,
    "`vmap` of an ensemble": ensemble,
    "`jacrev`": jacobian,
    "gradient checkpointing": checkpointed,
    "LBFGS": quasi_newton,
    "optimizers that average in `eval()`": averaging,
    "SWA, EMA and `project`": averaged,
    "pruning": pruned,
    "tied layers": tied,
    "recurrent layers, copied": recurrent,
    "optimizer steps in the backward pass": hooked,
}


# Of what several processes found (processes.py): the feature there, and what makes a cell of a method's result.
SEVERAL: dict[str, tuple[str, Callable[[dict[str, Any]], bool | str]]] = {
    "DistributedDataParallel": ("data_parallel", lambda r: r["ddp ranks"] == 0),
    "`constrain` after DistributedDataParallel": ("wrapped_first", lambda r: r[""] if isinstance(r[""], str) else True),
    "its processes share the steps": ("shared_work", lambda r: r["momentum ranks"] == 0 and r["uneven"]),
    "ZeroRedundancyOptimizer": ("data_parallel", lambda r: r["zero ranks"] == 0),
    "`fully_shard`": ("double", lambda r: r["momentum ranks"] == 0),
    "`fully_shard`, a plain optimizer": ("plain", lambda r: r["refused"] or True),
    "accumulation and clipping of it": ("clipped_and_accumulated", lambda r: "apart" in r),
    "bfloat16 by its policy": ("half", lambda r: r["refused"] or True),
    "activation checkpointing, CPU offload of it": (
        "recomputed_and_offloaded",
        lambda r: r["recomputed ranks"] == r["offloaded ranks"] == 0,
    ),
    "`torch.distributed.checkpoint`, async too": ("resumed", lambda r: r["at once"] == r["async"] == 0),
    "`report`, `project`, checkpoints of it": ("whole_again", lambda r: r["loaded"] == 0),
    "`release` of it": ("whole_again", lambda r: r["released"] or True),
    "`parallelize_module`": ("tensor_parallel", lambda r: r["refused"] or r["ranks"] == 0),
}


def cell(found: bool | str) -> str:
    """Right, silently wrong, or (a message) refused."""
    return REFUSED if isinstance(found, str) else RIGHT if found else "silent"


def outcome(feature: Callable[[str], bool], method: str) -> str:
    """What becomes of a feature: right, refused by name, silently wrong, or an error of somebody else's."""
    torch.manual_seed(0)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return RIGHT if feature(method) else "silent"
    except stiefel.StiefelError:
        return REFUSED
    except Exception as error:
        # An exporter reports the error that ended its attempts in its own.
        return REFUSED if "stiefel.errors." in str(error) else f"raw: {type(error).__name__}: {str(error)[:200]}"
    finally:
        logging.disable(logging.NOTSET)


def table(cells: dict[str, dict[str, str]]) -> str:
    """Features as rows; methods that have the same outcomes are one column."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for m in METHODS:
        groups.setdefault(tuple(row[m] for row in cells.values()), []).append(m)
    columns = sorted(groups.items(), key=lambda group: -len(group[1]))
    lines = ["| | " + " | ".join(", ".join(f"`{m}`" for m in methods) for _, methods in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[i] for column, _ in columns)} |" for i, name in enumerate(cells)]
    return "\n".join(lines) + "\n"


def documented() -> dict[str, dict[str, str]]:
    """The cells of the document's tables, by feature and method."""
    found = {}
    for mark in ("one process", "several processes"):
        head, _, *lines = part(mark).strip().splitlines()
        groups = [re.findall(r"`(\w+)`", cell) for cell in head.split("|")[2:-1]]
        for line in lines:
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            found[name] = {m: cell for methods, cell in zip(groups, cells, strict=True) for m in methods}
    return found


def part(mark: str) -> str:
    """What the document has between two marks."""
    return DOCUMENT.read_text().split(f"<!-- {mark} -->\n")[1].split("<!-- end -->")[0]


def in_one_process() -> dict[str, dict[str, str]]:
    """The table's cells."""
    return {name: {m: outcome(feature, m) for m in METHODS} for name, feature in FEATURES.items()}


def in_several(found: Callable[[str], dict[str, dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """The cells of the table of several processes, of what they found by feature and method."""
    return {name: {m: cell(of(r)) for m, r in found(feature).items()} for name, (feature, of) in SEVERAL.items()}


def by_package(outcomes: dict[str, dict[str, str]]) -> str:
    """Packages as rows, outcomes as columns, and the classes that have them."""
    kinds = list(dict.fromkeys(kind for row in outcomes.values() for kind in row.values()))
    kinds.sort(key=lambda kind: (kind != RIGHT, kind))
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for package, row in outcomes.items():
        cells = [", ".join(name for name, found in row.items() if found == kind) for kind in kinds]
        lines.append(f"| {package} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Write the tables into the document."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("parallel", "integrations")]
    import test_processes
    from test_optimizer_classes import outcomes

    test_processes.ASKED = test_processes.METHODS
    tables = {
        "one process": lambda: table(in_one_process()),
        "optimizers": lambda: by_package(outcomes()),
        "several processes": lambda: table(in_several(test_processes.found)),
    }
    for mark in sys.argv[1:] or tables:
        new, text = tables[mark](), DOCUMENT.read_text()
        DOCUMENT.write_text(text.replace(f"<!-- {mark} -->\n{part(mark)}", f"<!-- {mark} -->\n\n{new}\n"))


if __name__ == "__main__":
    write()
