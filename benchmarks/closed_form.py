"""Known optima: how far from the best orthonormal matrix a method is, against steps and seconds.

- procrustes: ``min ½ mean ‖y − W x‖²`` over W (n, p) with orthonormal columns, from all examples at every step. The
  minimizer is the polar factor of YᵀX (Schönemann, Psychometrika 1966).
- pca: ``max ½ mean ‖W x‖²`` over W (p, n) with orthonormal rows, from a few examples a step (Oja, 1982; online). The
  maximum is half the sum of the p largest eigenvalues of XᵀX/N.

The metric is the gap ``(f − f*)/|f*|`` at the orthonormal matrix nearest to the weight: no method gains by leaving the
set, and how far it left is recorded beside. f and f* are computed in float64, from the float32 data that train. Train,
validation and test data are one: nothing is to be generalized. The rate decays along a half cosine for all methods.

    stiefel compare benchmarks/closed_form.py --budget small --methods own riemannian pogo soft unconstrained
    stiefel compare benchmarks/closed_form.py --budget paper --device cuda
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from stiefel.compare import Batch, Data, Problem
from stiefel.errors import ProblemError
from stiefel.linalg import nearest_orthonormal


@dataclass(frozen=True, kw_only=True)
class ClosedForm(Problem):
    """Procrustes or online PCA with dimensions p ≤ n and the inputs' covariance of eigenvalues from 1 to 1/condition.

    There are 2 p examples for procrustes, of which ``steps`` are taken per epoch on all at once, and 4 n for pca, of
    which an epoch takes each once, ``batch_size`` a step.
    """

    task: str = "procrustes"
    n: int = 200
    p: int = 100
    condition: float = 100.0
    noise: float = 0.1
    steps: int = 20
    epochs: int = 30
    batch_size: int = 50

    metric = "gap"
    higher_is_better = False
    log_scale = True
    scales = (1.0,)
    learning_rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    default_rate = 1.0
    grid: ClassVar = {"task": ("procrustes", "pca")}
    budgets: ClassVar = {
        "tiny": {"n": (20,), "p": (10,), "epochs": (5,), "steps": (10,), "batch_size": (20,)},
        "small": {},
        "paper": {
            "n": (2000,),
            "p": (1500,),
            "condition": (1000.0,),
            "epochs": (50,),
            "steps": (200,),
            "batch_size": (100,),
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in ("procrustes", "pca") or not 1 <= self.p <= self.n or self.batch_size > 4 * self.n:
            raise ProblemError(
                f"task={self.task!r}, n={self.n}, p={self.p}, batch_size={self.batch_size}: expected procrustes or pca "
                "with 1 ≤ p ≤ n and batch_size ≤ 4 n"
            )

    def make_model(self) -> nn.Module:
        """W alone: (n, p) for procrustes, (p, n) for pca."""
        return nn.Linear(*((self.p, self.n) if self.task == "procrustes" else (self.n, self.p)), bias=False)

    def make_data(self) -> Data:
        """All examples as every batch of procrustes; examples to be shuffled of pca."""
        whole = [self.examples]
        return Data(whole * self.steps if self.task == "procrustes" else self.examples, whole, whole)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Half a cosine: sampling noise, and steps whose length is the rate, must die out for the gap to close."""
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """f on a batch."""
        return self.objective(model(batch[0]), batch)

    def objective(self, outputs: Tensor, batch: Batch) -> Tensor:
        """``½ mean ‖y − W x‖²`` or ``−½ mean ‖W x‖²`` of outputs ``W x``."""
        if self.task == "procrustes":
            return (batch[1] - outputs).square().sum(-1).mean() / 2
        return -outputs.square().sum(-1).mean() / 2

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The gap at the nearest orthonormal matrix; of a weight that is not finite, NaN."""
        (batch,) = ([part.double() for part in batch] for batch in batches)
        assert isinstance(model, nn.Linear)
        weight = model.weight.double()
        if not weight.isfinite().all():
            return {self.metric: float("nan")}
        value = self.objective(batch[0] @ orthonormal(weight).mT, batch).item()
        return {self.metric: (value - self.optimum) / abs(self.optimum)}

    @property
    def target(self) -> float:  # type: ignore[override]
        """The gap to be reached: sampling noise leaves more of it to pca."""
        return 1e-6 if self.task == "procrustes" else 1e-3

    @cached_property
    def examples(self) -> tuple[Tensor, ...]:
        """Inputs whose covariance has the given eigenvalues exactly, and for procrustes targets ``W₀ x + noise``."""
        size, count = (self.p, 2 * self.p) if self.task == "procrustes" else (self.n, 4 * self.n)
        random = torch.Generator().manual_seed(0)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        eigenvalues = torch.logspace(0, -torch.tensor(self.condition).log10().item(), size, dtype=torch.float64)
        left, right = (torch.linalg.qr(gaussian(rows, size))[0] for rows in (count, size))
        # x = √N Q Λ^½ Rᵀ with QᵀQ = RᵀR = I, so that xᵀx/N = R Λ Rᵀ exactly.
        x = count**0.5 * left * eigenvalues.sqrt() @ right.mT
        if self.task == "pca":
            return (x.float(),)
        y = x @ orthonormal(gaussian(self.n, self.p)).mT + self.noise * gaussian(count, self.n)
        return x.float(), y.float()

    @cached_property
    def optimum(self) -> float:
        """f*: by the SVD of YᵀX, or by the eigenvalues of XᵀX."""
        x, *targets = (part.double() for part in self.examples)
        if self.task == "pca":
            return -torch.linalg.eigvalsh(x.mT @ x / len(x))[-self.p :].sum().item() / 2
        (y,) = targets
        # ‖W x‖ = ‖x‖, and the maximum of tr(Wᵀ YᵀX)/N is the nuclear norm of YᵀX/N.
        nuclear = torch.linalg.svdvals(y.mT @ x / len(x)).sum()
        return ((x.square().sum() + y.square().sum()) / len(x) / 2 - nuclear).item()


def orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns.

    On the host: LAPACK's divide and conquer is quicker than the Jacobi method of GPUs.
    """
    return nearest_orthonormal(matrix.cpu()).to(matrix.device)
