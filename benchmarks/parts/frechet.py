"""Fréchet distance of images in the features of a classifier trained here (Heusel et al., NeurIPS 2017).

The classifier is trained once, on the training images of a data set, and kept in the user's cache folder under a
checksum of this file, of the data, and of torch's version.
"""

import ast
import contextlib
import hashlib
import os
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 64
STEPS, BATCH = 2000, 64


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^{1/2})`` of the Gaussians with the moments of two samples, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of ``Σ₁^{1/2} Σ₂ Σ₁^{1/2}``, which is symmetric.

    Args:
        x: ``(N, features)``, N ≥ 2.
        y: ``(M, features)``, M ≥ 2.

    Source: Dowson and Landau, Journal of Multivariate Analysis, 1982.
    """
    x, y = x.double(), y.double()
    first, second = (torch.atleast_2d(sample.T.cov()) for sample in (x, y))
    root = _root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    squares = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace()
    return max(0.0, (squares - 2 * cross).item())


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Classifier(nn.Module):
    """Two strided convolutions and two linear layers; the output of the first of these are the features."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, FEATURES),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """Images ``(N, 1, size, size)`` to features ``(N, 64)``."""
        return torch.cat([self.body(part) for part in images.split(1024)])

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, 1, size, size)`` to logits ``(N, 10)``."""
        return self.head(self.body(images).relu())


def classifier(images: Tensor, labels: Tensor) -> Classifier:
    """The classifier of these training data, on the CPU: from the cache, or trained and put there where possible."""
    with torch.random.fork_rng(devices=[]):  # a run's random numbers are left alone
        network = Classifier(images.shape[-1]).requires_grad_(False)
    path = cache_folder() / f"classifier-{_checksum(images, labels)}.pt"
    try:
        network.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):  # not there, or not whole
        network.load_state_dict(_train(images, labels).state_dict())
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            torch.save(network.state_dict(), temporary)
            temporary.replace(path)
    return network.eval()


def _train(images: Tensor, labels: Tensor) -> Classifier:
    """The same on every call, whatever the seeds and the number of threads are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            network = Classifier(images.shape[-1])
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
            for _ in range(STEPS):
                rows = torch.randint(len(images), (BATCH,))
                optimizer.zero_grad()
                F.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return network


def cache_folder() -> Path:
    """``stiefel`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stiefel"


def digest() -> str:
    """A checksum of this file; comments and layout apart."""
    return hashlib.sha256(ast.unparse(ast.parse(Path(__file__).read_text(encoding="utf-8"))).encode()).hexdigest()


def _checksum(images: Tensor, labels: Tensor) -> str:
    parts = [digest().encode(), torch.__version__.encode(), images.numpy().tobytes(), labels.numpy().tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
