"""Very deep networks: is it the orthogonal start that lets them train, or the constraint that keeps it?

Two results of others. Linear networks on whitened inputs learn in a number of steps that does not grow with depth from
orthogonal starts, and from Gaussian ones it does (Saxe, McClelland and Ganguli, ICLR 2014). Networks of tanh need an
orthogonal start with a gain a little above 1 (Pennington, Schoenholz and Ganguli, NeurIPS 2017; Xiao, Bahri,
Sohl-Dickstein, Schoenholz and Pennington, ICML 2018). Both are about starts; here two methods hold what was started.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import stiefel
from claims.outcome import COLOURS, Claim, Outcome, Rows, among, figure
from stiefel.compare import datasets

STARTS = {
    "orthogonal start": "unconstrained",
    "Gaussian start": None,
    "held by own": "own",
    "held by retraction": "retraction",
}
"""What is compared, and the method that makes it; a Gaussian start needs none."""
WIDTH = 64
ENOUGH = 0.9
"""The accuracy at which steps are counted."""
CLOSELY, SELDOM = 30, 5
"""How many steps are looked at each, and which later ones: looking costs as much as a step."""
FRESH = 1000
"""Seeds from here on report; those below choose the learning rate."""


Parts = list[tuple[Tensor, Tensor]]


@cache
def whitened() -> Parts:
    """Training, validation and test data of the digits, inputs with mean 0 and covariance I on the first."""
    found = datasets.load("digits", None)
    parts: list[Any] = [found.train, found.validation, found.test]
    first = parts[0][0].double()
    values, vectors = torch.linalg.eigh(torch.cov(first.T))
    told = values > 1e-4 * values.max()  # pixels that are always blank have no variance to be made 1
    white = vectors[:, told] / values[told].sqrt()
    return [(((x.double() - first.mean(0)) @ white).float(), y) for x, y in parts]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the experiment is.

    Args:
        depths: hidden layers, of linear networks the first two, of tanh networks the last two.
        steps: at most.
        ladder: learning rates, √2 apart.
        batch, seeds: examples a step; networks of each kind that are reported.
        jobs: processes that train.
    """

    depths: tuple[int, int, int] = (10, 100, 200)
    steps: int = 300
    ladder: tuple[float, ...] = tuple(1e-4 * 2 ** (k / 2) for k in range(25))
    batch: int = 128
    seeds: int = 3
    jobs: int = 2


@dataclass(frozen=True)
class Network:
    """A network of many equal layers without biases, and how it is trained.

    Args:
        activation: linear (squared loss, as in the theory) or tanh (cross-entropy).
        depth: hidden layers of ``WIDTH`` units.
        gain: scale of an orthogonal start; standard deviation of a Gaussian one, times √n.
        start: of ``STARTS``.
        size: of the experiment; its ``steps`` are the limit.
    """

    activation: str
    depth: int
    gain: float
    start: str
    size: Size

    def __str__(self) -> str:
        return f"{self.activation}, {self.depth} layers, gain {self.gain:g}, {self.start}"

    def make(self) -> nn.Module:
        """The network, from the current seed."""
        net = nn.Sequential()
        for i in range(self.depth):
            layer = nn.Linear(WIDTH if i else whitened()[0][0].shape[1], WIDTH, bias=False)
            nn.init.normal_(layer.weight, std=self.gain / math.sqrt(layer.in_features))
            net.add_module(f"hidden{i}", layer)
            if self.activation == "tanh":
                net.add_module(f"tanh{i}", nn.Tanh())
        net.add_module("head", nn.Linear(WIDTH, 10, bias=False))
        method = STARTS[self.start]
        return net if method is None else stiefel.constrain(net, method, exclude=["head"], scale=self.gain)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """½‖y − onehot‖² in the mean over examples, or cross-entropy."""
        if self.activation == "tanh":
            return F.cross_entropy(outputs, labels)
        return 0.5 * (outputs - F.one_hot(labels, 10)).square().sum(1).mean()

    def train(self, lr: float, seed: int) -> tuple[float, float]:
        """Train by plain SGD until accuracy is ``ENOUGH``, on validation data or, of fresh seeds, on test data.

        Returns:
            how many steps it took, infinite where it did not get there; the best accuracy.
        """
        torch.manual_seed(seed)
        model, ((x, y), validation, test) = self.make(), whitened()
        held_out, labels = test if seed >= FRESH else validation
        optimizer, best = stiefel.optimizer(model, torch.optim.SGD, lr=lr), 0.0
        order = torch.Generator().manual_seed(seed)
        for step in range(1, self.size.steps + 1):
            rows = torch.randint(len(y), (self.size.batch,), generator=order)
            loss = self.loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            try:
                optimizer.step()
            except stiefel.DivergenceError:
                break
            if not loss.isfinite():
                break
            if step > CLOSELY and step % SELDOM:
                continue
            with torch.no_grad():
                best = max(best, (model(held_out).argmax(1) == labels).double().mean().item())
            if best >= ENOUGH:
                return step, best
        return math.inf, best

    def rows(self) -> Rows:
        """Of rates a factor 4 apart, then √2 around the best, on a seed for choosing; of the best on fresh seeds."""
        what = {"activation": self.activation, "depth": self.depth, "gain": self.gain, "start": self.start}
        ladder = self.size.ladder
        tried: dict[float, tuple[float, float]] = {}
        for lr in ladder[::4]:
            tried[lr] = self.train(lr, 0)
        at = ladder.index(_best(tried))
        for lr in ladder[max(0, at - 3) : at + 4]:
            if lr not in tried:
                tried[lr] = self.train(lr, 0)
        lr = _best(tried)
        found = [("tuning", rate, 0, *result) for rate, result in tried.items()]
        found += [("final", lr, FRESH + seed, *self.train(lr, FRESH + seed)) for seed in range(self.size.seeds)]
        return [what | dict(zip(("phase", "lr", "seed", "steps", "best"), row, strict=True)) for row in found]


def run(size: Size) -> Outcome:
    """Steps to 90 % by depth of linear networks, and the best accuracy of tanh networks, from each start."""
    shallow, deep, deepest = size.depths
    free = [start for start, method in STARTS.items() if method in (None, "unconstrained")]
    cases = [("tanh", deepest, 1.05, start) for start in free]  # to hold 200 layers takes ten times as long
    cases += [("tanh", deep, 1.05, start) for start in STARTS]
    cases += [("linear", depth, 1.0, start) for depth in (deep, shallow) for start in STARTS]
    cases += [("tanh", depth, 1.0, start) for depth in (deepest, deep) for start in free]
    networks = [Network(*case, size) for case in cases]
    rows: Rows = []
    with _workers(size.jobs) as run_all:
        for network, found in zip(networks, run_all(Network.rows, networks), strict=True):
            rows += found
            print(f"{network}: {_told(found[-size.seeds :])}", flush=True)
    return Outcome(rows, _sentence(rows, size), _picture(rows, size))


@contextmanager
def _workers(jobs: int) -> Iterator[Callable[..., Iterable[Rows]]]:
    """``map`` in so many processes."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map


def _best(tried: dict[float, tuple[float, float]]) -> float:
    """The rate of the fewest steps; where none got there, of the best accuracy."""
    return min(tried, key=lambda lr: (tried[lr][0], -tried[lr][1]))


def _told(rows: Rows) -> str:
    """Steps of some reported runs, or how far they came."""
    steps = sorted(r["steps"] for r in rows)
    if math.isinf(steps[len(steps) // 2]):
        return f"never (at best {max(r['best'] for r in rows):.2f})"
    return f"{steps[len(steps) // 2]:g}"


def _sentence(rows: Rows, size: Size) -> str:
    shallow, deep, deepest = size.depths
    parts = []
    for activation, depths, gain in (("linear", (shallow, deep), 1.0), ("tanh", (deep, deepest), 1.05)):
        listed = (
            f"{start} "
            + " / ".join(
                _told(among(rows, phase="final", activation=activation, depth=d, gain=gain, start=start))
                for d in depths
                if among(rows, activation=activation, depth=d, gain=gain, start=start)
            )
            for start in STARTS
        )
        parts.append(f"{activation}, gain {gain:g}, {depths[0]} / {depths[1]} layers: {', '.join(listed)}")
    return (
        f"Steps to {ENOUGH:.0%} of the test data at the rate chosen, the median over seeds. " + "; ".join(parts) + "."
    )


def _picture(rows: Rows, size: Size) -> Figure:
    """Steps against the learning rate, a panel for each kind of network; on the upper line, never."""
    shallow, deep, deepest = size.depths
    panels = [("linear", (shallow, deep), 1.0), ("tanh", (deep, deepest), 1.0), ("tanh", (deep, deepest), 1.05)]
    made, axes = figure(3)
    never = 1.5 * size.steps
    for ax, (activation, depths, gain) in zip(axes[0], panels, strict=True):
        for start, colour in zip(STARTS, COLOURS, strict=False):
            for depth, style in zip(depths, ("--", "-"), strict=True):
                about = {"activation": activation, "depth": depth, "gain": gain, "start": start}
                tried = sorted(among(rows, phase="tuning", **about), key=lambda r: r["lr"])
                steps = [min(r["steps"], never) for r in tried]
                label = start if depth == depths[1] else None
                if tried:
                    ax.plot([r["lr"] for r in tried], steps, style, marker=".", color=colour, label=label)
        ax.axhline(never, color="0.7", linewidth=0.8, zorder=0)
        ax.text(1, never * 0.96, "never ", ha="right", va="top", color="0.4", transform=ax.get_yaxis_transform())
        ax.set(
            xscale="log", yscale="log", xlabel="learning rate", ylabel=f"steps to {ENOUGH:.0%}", ylim=(1, 1.2 * never)
        )
        ax.set_title(f"{activation}, gain {gain:g}: {depths[0]} (dashed), {depths[1]} layers", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return made


CLAIM = Claim(
    "Deep linear and tanh networks train from orthogonal starts and not from Gaussian ones.",
    run,
    shown=Size(),
    tiny=Size(depths=(2, 3, 4), steps=10, ladder=(0.03, 0.1), seeds=2, jobs=1),
)
