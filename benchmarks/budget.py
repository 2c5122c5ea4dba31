"""What a training step asks of an accelerator: operations, float64, waits, products and memory, counted on a CPU.

    python benchmarks/budget.py             # prints the table; --write puts it into docs/budget.md
    python benchmarks/budget.py --kernels   # on a CUDA device: the kernels that it is given

A stand-in takes the place of the device (:mod:`costs.elsewhere`): its tensors say that they are there, so that each
branch that a method takes on a GPU runs, with real numbers. Nothing in the table is a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from costs.elsewhere import Counts, elsewhere
from torch import Tensor, nn

import stiefel

PAGE = Path(__file__).resolve().parents[1] / "docs" / "budget.md"
SHAPES = ((64, 64), (32, 288))
MEMBERS = 2
"""Weights that are computed as one batch."""


@dataclass(frozen=True)
class Budget:
    """What a method adds to a step of two layers of one shape with plain weights.

    Args:
        launches: operations that are no views, each some kernels on a GPU.
        doubles: those of them with float64.
        waits: what the host waits for.
        products: multiplications, in units of one product p×p by p×n for each weight.
        peak: the most memory that a step's new tensors have at a time, in sizes of the weights.
    """

    launches: int
    doubles: int
    waits: int
    products: float
    peak: float


class Net(nn.Module):
    """Two layers, which see the same input."""

    def __init__(self, p: int, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, p, bias=False) for _ in range(MEMBERS))

    def forward(self, x: Tensor) -> Tensor:
        """Their sum."""
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def training(method: str | None, p: int, n: int, device: str = "cpu") -> Callable[[], None]:
    """A step of training by plain SGD with momentum."""
    torch.manual_seed(0)
    net = Net(p, n).to(device)
    if method is not None:
        stiefel.constrain(net, method)
        optimizer = stiefel.optimizer(net, torch.optim.SGD, lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(16, n, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        optimizer.zero_grad()
        loss = net(x).square().mean() + (stiefel.penalty(net) if method is not None else 0)
        loss.backward()
        optimizer.step()

    return step


def counted(method: str | None, p: int, n: int, double: str) -> tuple[Counts, float]:
    """The counts of the third step, and the peak of its memory."""
    step = training(method, p, n)
    with elsewhere("cuda", double=double, waits=True) as counts:
        for _ in range(2):
            step()
        counts.clear()
        step()
    return counts, counts.peak / (4 * MEMBERS * p * n)


def kernels(method: str, p: int, n: int) -> int:
    """The kernels that a CUDA device is given in the third step, less those of plain layers."""
    found = []
    for name in (method, None):
        step = training(name, p, n, "cuda")
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
            step()
            torch.cuda.synchronize()
        events = [e for e in seen.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
        found.append(sum(not e.name.startswith(("Memcpy", "Memset")) for e in events))
    return found[0] - found[1]


def budget(method: str, p: int, n: int, double: str = "fast") -> Budget:
    """What a method adds."""
    (mine, peak), (plain, _) = counted(method, p, n, double), counted(None, p, n, double)
    unit = 2 * MEMBERS * p * p * n
    return Budget(
        mine.launches - plain.launches,
        mine.doubles,
        len(mine.waits),
        round((mine.flops - plain.flops) / unit, 1),
        round(peak, 1),
    )


HEAD = f"""# What a step asks of an accelerator

Counted on a CPU with a stand-in for the device; nothing here is a time. Launches are torch operations that are no
views, of a step of {MEMBERS} layers that are computed as one batch, less those of plain layers (third step, SGD with
momentum, float32). Products are in units of one product p×p by p×n per weight; waits are reads by the host, also those
within torch's own kernels, by its sources; peak is what the step's tensors hold at most, in sizes of the weights.
Written by `python benchmarks/budget.py --write`; `tests/laws/test_budget.py` holds the counts. Where a device has no
float64, or a slow one, steps are in float32 alone (`stiefel.use_double`): the last columns.
"""


def table() -> str:
    """The counts of every method, as Markdown."""
    columns = [f"{what}, {p}×{n}" for p, n in SHAPES for what in ("launches", "in float64", "products", "peak")]
    alone = [f"launches in float32 alone, {p}×{n}" for p, n in SHAPES]
    lines = [f"| method | waits | {' | '.join([*columns, *alone])} |", "|---" * (len(columns) + len(alone) + 2) + "|"]
    for method in stiefel.available():
        found = [budget(method, p, n) for p, n in SHAPES]
        narrow = [budget(method, p, n, "slow").launches for p, n in SHAPES]
        cells = [str(value) for b in found for value in (b.launches, b.doubles, b.products, b.peak)]
        lines.append(f"| `{method}` | {found[0].waits} | {' | '.join([*cells, *map(str, narrow)])} |")
    return "\n".join(lines)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--kernels", action="store_true", help="on a CUDA device: the kernels of a step")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.kernels:
        for method in stiefel.available():
            print(
                f"{method:>18}  " + ", ".join(f"{p}×{n}: {kernels(method, p, n)} kernels" for p, n in SHAPES),
                flush=True,
            )
        return
    found = table()
    print(found)
    if given.write:
        notes = PAGE.read_text(encoding="utf-8").partition("\n## ")[2] if PAGE.exists() else ""
        PAGE.write_text(f"{HEAD}\n{found}\n" + (f"\n## {notes}" if notes else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
