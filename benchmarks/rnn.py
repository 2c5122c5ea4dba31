"""Long memory: a recurrent network whose hidden-to-hidden matrix is orthogonal, in LSTM and GRU gate by gate.

Two tasks that need what was seen many steps ago:

- copying (Hochreiter and Schmidhuber, 1997, in the form of Arjovsky, Shah and Bengio, ICML 2016): ten symbols of eight,
  T blanks of which the last is a sign, and ten blanks during which the ten symbols are to be repeated;
- digits, pixel by pixel (Le, Jaitly and Hinton, arXiv 1504.00941): an image is read one pixel a step, then named.

The metric is the cross-entropy over that of a predictor without memory, which so has 1: 10 log 8/(T + 20) per step of
copying (the blanks known, the symbols guessed), log 10 of digits. Whether strict orthogonality is what memory wants is
the question of Vorontsov, Trabelsi, Kadoury and Pal (ICML 2017).

In the literature copying is learned by cells with modReLU, trained by RMSprop, the recurrent matrix at a tenth of the
rate (Helfrich, Willmott and Ye, ICML 2018; Lezcano-Casado and Martínez-Rubio, ICML 2019): ``--budget literature``, over
that share of the rate too.

    stiefel compare benchmarks/rnn.py --budget small --methods own riemannian soft unconstrained
    stiefel compare benchmarks/rnn.py --budget literature --methods own matrix_exp unconstrained default
    stiefel compare benchmarks/rnn.py --budget paper --device cuda --cell rnn lstm gru
    stiefel compare benchmarks/rnn.py --budget paper --device cuda --task copying --delay 200 1000
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from parts.fresh_batches import Draws
from parts.modrelu import ModReLU
from parts.norms import OverStates
from torch import Tensor, nn

from stiefel.compare import Batch, Data, Problem, datasets, where
from stiefel.errors import ProblemError

CELLS: dict[str, Any] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU, "modrelu": ModReLU}
OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}
RECALLED, SYMBOLS = 10, 8
BLANK, SIGN, ALPHABET = 8, 9, 10


@dataclass(frozen=True, kw_only=True)
class Recurrent(Problem):
    """One recurrent layer with a linear readout, on the copying task or on digits pixel by pixel.

    ``delay`` is copying's T, ``steps`` its batches per epoch; ``data`` names the images, of 64 pixels (digits) or 784.
    ``recurrent`` is the recurrent matrices' learning rate over that of the other parameters.
    """

    task: str = "copying"
    cell: str = "rnn"
    hidden: int = 64
    delay: int = 10
    steps: int = 30
    epochs: int = 20
    batch_size: int = 64
    optim: str = "adam"  # or rmsprop
    recurrent: float = 1.0
    norm: str = "none"  # of the states that are read out: none, batch, layer, group, whitening; the recurrence has none
    data: str = "digits"
    examples: int | None = None  # of the images at most; a quarter as many to validate and test with
    data_dir: str | None = where(None, "folder with the idx files of Fashion-MNIST")

    metric = "relative_cross_entropy"
    higher_is_better = False
    layers = ("rnn.weight_hh_l0",)
    scales = (1.0,)
    learning_rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    default_rate = 1e-3
    evaluation_batch = 1000
    grid: ClassVar = {"task": ("copying", "digits")}
    budgets: ClassVar = {
        "tiny": {"hidden": (16,), "delay": (5,), "steps": (5,), "epochs": (2,), "batch_size": (256,)},
        "small": {},
        "literature": {
            "cell": ("modrelu",),
            "optim": ("rmsprop",),
            "recurrent": (0.1, 1.0, 10.0),
            "task": ("copying",),
            "delay": (100,),
            "hidden": (100,),
            "steps": (50,),
        },
        "paper": {
            "hidden": (128,),
            "delay": (200,),
            "steps": (400,),
            "epochs": (25,),
            "batch_size": (128,),
            "data": ("fashion-mnist",),
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("task", ("copying", "digits")), ("cell", CELLS), ("optim", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ProblemError(f"{name}={getattr(self, name)!r}: expected {' or '.join(known)}")

    def make_model(self) -> nn.Module:
        """``cell → linear``, read at every step (copying) or at the last (digits)."""
        copying = self.task == "copying"
        return Network(self.cell, ALPHABET if copying else 1, self.hidden, every_step=copying, norm=self.norm)

    def make_data(self) -> Data:
        """Sequences that are drawn anew for every training batch, or images as sequences of pixels."""
        if self.task == "copying":
            held_out = [copying(1000, self.delay) for _ in range(2)]
            return Data(Draws(partial(copying, self.batch_size, self.delay), self.steps), *held_out)
        found = datasets.load(self.data, self.data_dir, examples=self.examples)
        return Data(*((_pixels(x), y) for x, y in (found.train, found.validation, found.test)))

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:  # type: ignore[override]
        """Adam or RMSprop."""
        return OPTIMIZERS[self.optim]

    def parameters(self, model: nn.Module, lr: float) -> Iterable[Any]:
        """The recurrent matrices at their share of the rate, and the rest."""
        groups: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, parameter in model.named_parameters():
            groups["weight_hh" in name].append(parameter)
        return [{"params": groups[False]}, {"params": groups[True], "lr": lr * self.recurrent}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, mean over examples and, in copying, over all T + 20 steps."""
        return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The metric, and the accuracy: of the symbols to be repeated, or of digits."""
        inputs, targets = batch
        logits = model(inputs)
        relative = F.cross_entropy(logits.flatten(0, -2), targets.flatten()).item() / self.memoryless
        right = logits.argmax(-1) == targets
        if self.task == "copying":
            right = right[:, -RECALLED:]
        return {self.metric: relative, "accuracy": right.float().mean().item()}

    @property
    def memoryless(self) -> float:
        """Cross-entropy of the best predictor that remembers nothing of the sequence's content."""
        if self.task == "copying":
            return RECALLED * math.log(SYMBOLS) / (self.delay + 2 * RECALLED)
        return math.log(10)

    @property
    def target(self) -> float:  # type: ignore[override]
        """Half of the memoryless cross-entropy, a quarter for digits, which a few of the last pixels tell apart too."""
        return 0.5 if self.task == "copying" else 0.25


class Network(nn.Module):
    """``h ← tanh(W_ih x + b_ih + W_hh h + b_hh)``, or a gated cell; ``y = W h + b``.

    The recurrent matrix, or each gate's, starts as rotations of planes by angles in [0, π/2] (Henaff, Szlam and LeCun,
    ICML 2016): from a random orthogonal matrix, plain cells learn to copy far more slowly, with every method.
    """

    def __init__(self, cell: str, inputs: int, hidden: int, *, every_step: bool, norm: str = "none") -> None:
        super().__init__()
        self.rnn = CELLS[cell](inputs, hidden, batch_first=True)
        self.head: nn.Module = nn.Linear(hidden, 10)
        if norm != "none":
            self.head = nn.Sequential(OverStates(norm, hidden), self.head)
        self.every_step = every_step
        with torch.no_grad():
            for gate in self.rnn.weight_hh_l0.split(hidden):
                gate.copy_(rotations(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, steps, inputs)`` to logits ``(batch, steps, 10)``, or ``(batch, 10)``."""
        states, _ = self.rnn(x)
        return self.head(states if self.every_step else states[:, -1])


def rotations(n: int) -> Tensor:
    """An orthogonal matrix (n, n) that rotates n/2 planes by random angles in [0, π/2]."""
    angles = torch.rand(n // 2) * math.pi / 2
    planes = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).reshape(-1, 2, 2)
    return torch.block_diag(*planes, *torch.ones(n % 2, 1, 1))


def copying(examples: int, delay: int) -> tuple[Tensor, Tensor]:
    """Sequences of the copying task: one-hot inputs ``(examples, T + 20, 10)`` and targets ``(examples, T + 20)``."""
    symbols = torch.randint(SYMBOLS, (examples, RECALLED))
    # Ten symbols, T − 1 blanks, the sign, ten blanks; the targets are blank but for the last ten.
    inputs = torch.full((examples, delay + 2 * RECALLED), BLANK)
    targets = inputs.clone()
    inputs[:, :RECALLED] = symbols
    inputs[:, RECALLED + delay - 1] = SIGN
    targets[:, -RECALLED:] = symbols
    return F.one_hot(inputs, ALPHABET).float(), targets


def _pixels(images: Tensor) -> Tensor:
    """Rows of images as sequences ``(examples, pixels, 1)``, Fashion-MNIST without its padding to 32×32."""
    if images.shape[1] == 1024:
        images = images.reshape(-1, 32, 32)[:, 2:-2, 2:-2].flatten(1)
    return images.unsqueeze(-1)
