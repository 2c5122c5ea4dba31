"""Solvers on objectives without a network: how near the optimum each ends, after how many evaluations and seconds.

    python benchmarks/solvers.py               # prints the table; --write puts it into docs/solvers.md
    python benchmarks/solvers.py --only gates  # the jobs whose names contain this

``stiefel.minimize``, a reparameterization under torch's own L-BFGS, pymanopt's conjugate gradients and trust region,
and geoopt's line search, from one start each. An evaluation is a call of the loss, with or without its gradient, or a
product with the Hessian. Each solver is asked for a gradient of 1e-9 and has at most 30 seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parts.objectives import Objective, Weights, objectives
from torch import Tensor, nn

import stiefel

TOLERANCE, SECONDS, EVALUATIONS = 1e-9, 30.0, 20_000
PAGE = Path(__file__).resolve().parents[1] / "docs" / "solvers.md"


@dataclass(frozen=True)
class Result:
    """Where a solver has ended.

    Args:
        gap: ``(f − f*) / max(1, |f*|)``.
        gradient: ‖P_X(G)‖_F.
        evaluations: of the loss.
        seconds: they took.
        failed: why there is none.
    """

    gap: float = float("nan")
    gradient: float = float("nan")
    evaluations: int = 0
    seconds: float = 0.0
    failed: str = ""


class Counted:
    """A loss that counts its evaluations, and raises ``TimeoutError`` after too many or too long."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss, self.count, self.end = loss, 0, time.monotonic() + SECONDS

    def __call__(self, *args: Any) -> Tensor:
        """The loss."""
        self.count += 1
        if self.count > EVALUATIONS or time.monotonic() > self.end:
            raise TimeoutError
        return self.loss(*args)


def ours(job: Objective, start: Weights, *, second_order: bool = False) -> tuple[Weights, int]:
    """``stiefel.minimize``."""
    net = job.module("retraction", start)
    found = stiefel.minimize(net, job.of(net), tol=TOLERANCE, second_order=second_order, max_evaluations=EVALUATIONS)
    return _values(net), found.evaluations


def torch_lbfgs(job: Objective, start: Weights) -> tuple[Weights, int]:
    """torch's L-BFGS over the proxies of the polar map."""
    net = job.module("own", start)
    optimizer = stiefel.optimizer(
        net,
        torch.optim.LBFGS,
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    counted = Counted(job.of(net))

    def closure() -> Any:
        optimizer.zero_grad()
        loss = counted()
        loss.backward()
        return loss

    with suppress(TimeoutError):
        optimizer.step(closure)
    return _values(net), counted.count


def pymanopts(job: Objective, start: Weights, *, solver: str) -> tuple[Weights, int]:
    """One of pymanopt's solvers."""
    import pymanopt
    from pymanopt import manifolds, optimizers

    def manifold(w: Tensor) -> Any:
        k, p, n = (w.shape[0] if w.ndim == 3 else 1), *w.shape[-2:]
        if w.is_complex():
            return manifolds.UnitaryGroup(n, k=k)
        if job.determinant is not None:
            return manifolds.SpecialOrthogonalGroup(n, k=k)
        return manifolds.Grassmann(n, p, k=k) if job.subspace else manifolds.Stiefel(n, p, k=k)

    names, sets = list(start), [manifold(w) for w in start.values()]
    product = sets[0] if len(sets) == 1 else manifolds.Product(sets)
    counted = Counted(lambda *xs: job.loss({name: x.mT for name, x in zip(names, xs, strict=True)}))
    # The decorator reads the signature, which has to name its arguments.
    arguments = ", ".join(f"x{i}" for i in range(len(names)))
    function = eval(f"lambda {arguments}: counted({arguments})", {"counted": counted})
    problem = pymanopt.Problem(product, pymanopt.function.pytorch(product)(function))
    made = getattr(optimizers, solver)(
        verbosity=0, max_time=SECONDS, max_iterations=EVALUATIONS, min_gradient_norm=TOLERANCE, min_step_size=1e-15
    )
    first = [w.mT.contiguous().numpy() for w in start.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = made.run(problem, initial_point=first[0] if len(first) == 1 else first).point
    points = [found] if len(first) == 1 else found
    return {k: torch.from_numpy(x.copy()).mT.contiguous() for k, x in zip(names, points, strict=True)}, counted.count


def geoopt_search(job: Objective, start: Weights) -> tuple[Weights, int]:
    """geoopt's line search with conjugate directions; 300 steps, since it has no rule to stop."""
    import geoopt

    if any(w.is_complex() for w in start.values()):
        raise NotImplementedError("real weights only")
    sets = geoopt.Stiefel()
    xs = {k: geoopt.ManifoldParameter(w.mT.contiguous(), manifold=sets) for k, w in start.items()}
    optimizer = geoopt.optim.RiemannianLineSearch(list(xs.values()), cg_method="pr")
    counted = Counted(lambda: job.loss({k: x.mT for k, x in xs.items()}))

    def closure() -> Any:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = counted()
            loss.backward()
        return loss.detach()

    with suppress(TimeoutError):
        for _ in range(300):
            optimizer.step(closure)
    return {k: x.detach().mT.contiguous() for k, x in xs.items()}, counted.count


SOLVERS: dict[str, Callable[[Objective, Weights], tuple[Weights, int]]] = {
    "`minimize`": ours,
    "`minimize`, second order": partial(ours, second_order=True),
    "torch's L-BFGS over `own`": torch_lbfgs,
    "pymanopt, conjugate gradients": partial(pymanopts, solver="ConjugateGradient"),
    "pymanopt, trust region": partial(pymanopts, solver="TrustRegions"),
    "geoopt, line search": geoopt_search,
}


def _values(net: nn.ParameterDict) -> Weights:
    with torch.no_grad():
        return {name: net[name].detach().clone() for name in net}


def measured(job: Objective, solver: Callable[[Objective, Weights], tuple[Weights, int]]) -> Result:
    """One solver on one job."""
    start = job.start()
    began = time.perf_counter()
    try:
        weights, evaluations = solver(job, start)
    except Exception as error:  # a peer's failure is a result
        return Result(failed=f"{type(error).__name__}: {error}".splitlines()[0][:60].rstrip(": "))
    seconds = time.perf_counter() - began
    gap = (float(job.loss(weights)) - job.best) / max(1.0, abs(job.best))
    return Result(gap, job.gradient_norm(weights), evaluations, seconds)


def table(job: Objective, results: dict[str, Result]) -> str:
    """The solvers on one job, as Markdown."""
    kind = "closed form" if job.optimum is not None else "best of 100 starts"
    lines = [
        f"## {job.name[0].upper()}{job.name[1:]}",
        "",
        f"Optimum {job.best:.10g} ({kind}).",
        "",
        "| solver | gap | ‖gradient‖ | evaluations | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, r in results.items():
        row = f"{r.gap:.1e} | {r.gradient:.1e} | {r.evaluations:,} | {r.seconds:.2f}"
        lines.append(f"| {name} | {f'— | — | — | {r.failed}' if r.failed else row} |")
    return "\n".join(lines)


HEAD = """# Solvers side by side

Objectives without a network ([jobs.md](jobs.md)), from one random start each, in float64 on one thread; written by
`python benchmarks/solvers.py --write`. The gap is (f − f*)/max(1, |f*|). Where no formula gives f* it is the least
found from 100 starts, and a solver may end at another minimum, with a gradient as small. Seconds are of one run on a
shared machine. An evaluation is a call of the loss, with or without its gradient, or a product with the Hessian. Each
solver was asked for a gradient of 1e-9, and had 30 seconds or 20,000 evaluations; geoopt's line search, which has no
rule to stop, 300 steps. geoopt has no Grassmann manifold, and none of rotations: there it keeps the start's component.
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="jobs whose names contain this")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tables = []
    for job in objectives():
        if given.only in job.name:
            tables.append(table(job, {name: measured(job, solver) for name, solver in SOLVERS.items()}))
            print(tables[-1], end="\n\n", flush=True)
    if given.write:
        PAGE.write_text("\n\n".join([HEAD.rstrip(), *tables]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
