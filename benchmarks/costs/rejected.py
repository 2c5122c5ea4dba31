"""What was tried for speed and not kept, or kept for a reason: each as a ratio within one run.

    python benchmarks/costs/rejected.py

docs/speed.md has the results. Imports the library's own pieces, and times them beside what they might have been.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stiefel.linalg import polar
from stiefel.linalg.inverse_root import inverse_root
from stiefel.linalg.lyapunov import lyapunov_by_products
from stiefel.linalg.qr import _by_reflections, qf
from stiefel.manifold.geometry import random_stiefel
from stiefel.measure.cost.clock import interleaved
from stiefel.methods.pogo import POGO

SHAPES = [(8, 128, 128), (8, 256, 256), (4, 512, 512), (16, 64, 576), (8, 128, 1152), (64, 16, 144), (1000, 32, 64)]


def blocked_gram(v: Tensor) -> Tensor:
    """VVᵀ in three quarters of the work: torch has no symmetric product."""
    half = v.shape[-2] // 2
    top, bottom = v[:, :half], v[:, half:]
    m = v.new_empty(len(v), v.shape[-2], v.shape[-2])
    off = torch.bmm(bottom, top.mT)
    m[:, :half, :half] = torch.bmm(top, top.mT)
    m[:, half:, half:] = torch.bmm(bottom, bottom.mT)
    m[:, half:, :half] = off
    m[:, :half, half:] = off.mT
    return m


def warm_root(gram: Tensor, d: Tensor, s: Tensor, steps: int) -> Tensor:
    """H = M^{1/2} from the eigenbasis of an earlier M by chord iterations in it, ``h ← h + (m − h²)/(sᵢ + sⱼ)``."""
    m = d.mT @ gram @ d
    sums = s.unsqueeze(-1) + s.unsqueeze(-2)
    h = torch.diag_embed(s)
    for _ in range(steps):
        h = h + (m - h @ h) / sums
    return d @ h @ d.mT


def kinds_of_step(b: int, p: int, n: int) -> dict[str, Callable[[], object]]:
    """What is timed at a shape, by name."""
    generator = torch.Generator().manual_seed(0)
    x = random_stiefel(b, p, n, generator=generator, dtype=torch.float32)
    noise = torch.randn(b, p, n, generator=generator) / (n**0.5 + p**0.5)
    v, g, u = x + 0.3 * noise, torch.randn(b, p, n, generator=generator), 0.01 * noise
    wide, root = v.double(), inverse_root(v)
    assert root is not None
    gram, h = wide @ wide.mT, root[1]
    c = g @ x.mT
    c = c - c.mT
    earlier = (x + 0.29 * noise).double()
    values, d = torch.linalg.eigh(earlier @ earlier.mT)
    s, leaf = values.sqrt(), v.clone().requires_grad_()
    pogo = POGO()
    compiled = torch.compile(pogo.step, dynamic=False)

    def forward_and_backward(solver: str) -> None:
        leaf.grad = None
        polar(leaf, solver=solver).backward(g)

    return {
        "product": lambda: torch.bmm(v, v.mT),
        "product in double": lambda: torch.bmm(wide, wide.mT),
        "blocked product": lambda: blocked_gram(v),
        "root": lambda: inverse_root(v),
        "warm root": lambda: warm_root(gram, d, s, 3),
        "lyapunov": lambda: lyapunov_by_products(h, c),
        "eigh": lambda: torch.linalg.eigh(gram),
        "own, products": lambda: forward_and_backward("products"),
        "own, eigen": lambda: forward_and_backward("eigen"),
        "QR, Cholesky": lambda: qf(v),
        "QR, reflections": lambda: _by_reflections(v),
        "pogo": lambda: pogo.step(x, u, 0.1),
        "pogo, compiled": lambda: compiled(x, u, 0.1),
    }


def main() -> None:
    """Print medians in milliseconds, a line per shape."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians in ms", flush=True)
    for shape in SHAPES:
        found = interleaved(kinds_of_step(*shape), torch.device("cpu"), warmup=2, repeats=9)
        print(f"{shape}: " + ", ".join(f"{name} {1e3 * t.median:.2f}" for name, t in found.items()), flush=True)


if __name__ == "__main__":
    main()
