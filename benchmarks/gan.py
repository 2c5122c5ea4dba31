"""A generative adversarial network whose discriminator is constrained: which constraint keeps the game stable?

A small DCGAN (Radford, Metz and Chintala, ICLR 2016): transposed convolutions with batch normalization against strided
convolutions without, whose kernels are constrained, as is the last layer (as in Miyato et al., ICLR 2018, and Huang et
al., CVPR 2020); the generator is free. The two are updated in turn, with the non-saturating loss (Goodfellow et al.,
NeurIPS 2014) and Adam (β₁ = 0.5). The metric is the Fréchet distance between generated and real images in the features
of a classifier that is trained here (``frechet.py``): it compares methods on these data, not with published distances.
Each run keeps a sheet of samples, ``samples.png``.

    stiefel compare benchmarks/gan.py --budget small --methods own oni spectral_norm unconstrained --no-cost
    stiefel compare benchmarks/gan.py --budget paper --device cuda
    python benchmarks/publish/stability.py runs/             how many learning rates end near the best
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from parts import frechet, norms
from parts.fresh_batches import Draws
from torch import Tensor, nn

import stiefel
from stiefel.compare import Batch, Data, Problem, datasets, where
from stiefel.errors import ProblemError


@dataclass(frozen=True, kw_only=True)
class GAN(Problem):
    """Digits (8×8) or Fashion-MNIST (32×32), averaged down to ``size``; ``held_out`` images of each part measure.

    An epoch is ``steps`` batches of images and noise, the same for every method of a seed.
    """

    data: str = "digits"
    size: int = 8
    width: int = 16
    latent: int = 32
    steps: int = 50
    epochs: int = 10
    batch_size: int = 64
    held_out: int = 360
    norm: str = "none"  # of the discriminator's activations: none, batch, layer, group, instance, whitening
    data_dir: str | None = where(None, "folder with the idx files of Fashion-MNIST")

    metric = "frechet_distance"
    higher_is_better = False
    exclude = ("generator",)
    scales = (1.0,)
    optimizer = torch.optim.Adam
    hyper: ClassVar = {"betas": (0.5, 0.999)}
    learning_rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    default_rate = 2e-4
    budgets: ClassVar = {
        "tiny": {"width": (4,), "latent": (8,), "steps": (5,), "epochs": (1,), "held_out": (200,)},
        "small": {"data": ("fashion-mnist",), "size": (16,), "held_out": (2000,)},
        "paper": {
            "data": ("fashion-mnist",),
            "size": (32,),
            "width": (64,),
            "latent": (100,),
            "steps": (500,),
            "epochs": (50,),
            "held_out": (10_000,),
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in (8, 16, 32):
            raise ProblemError(f"size={self.size}: images have 8, 16 or 32 pixels a side")

    @classmethod
    def digest(cls) -> str:
        """As of every problem, and with it of the classifier's source."""
        return hashlib.sha256((super().digest() + frechet.digest()).encode()).hexdigest()[:12]

    def make_model(self) -> nn.Module:
        """A generator of images from noise, and a discriminator of images."""
        return Game(self.size, self.width, self.latent, self.norm)

    def make_data(self) -> Data:
        """Batches of images in [−1, 1] and of noise, drawn for training, fixed for what measures."""
        (train, _), *held_out = self.images
        fixed = [(x, torch.randn(len(x), self.latent)) for x, _ in held_out]

        def draw() -> tuple[Tensor, Tensor]:  # with replacement
            rows = torch.randint(len(train), (self.batch_size,))
            return train[rows], torch.randn(self.batch_size, self.latent)

        return Data(Draws(draw, self.steps), *fixed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The discriminator's: ``mean [−log D(x) − log(1 − D(G(z)))]``."""
        images, noise = batch
        return self.discrimination(model, images, model.get_submodule("generator")(noise))

    def train_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        """One step of the discriminator down its loss, then one of the generator down ``mean −log D(G(z))``."""
        images, noise = batch
        generator, discriminator = model.get_submodule("generator"), model.get_submodule("discriminator")
        fakes = generator(noise)
        optimizer.zero_grad()
        loss = self.discrimination(model, images, fakes.detach())
        (loss + stiefel.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        # The discriminator's gradients stay None, so that this step moves the generator alone.
        F.softplus(-discriminator(fakes)).mean().backward(inputs=list(generator.parameters()))
        optimizer.step()
        return loss.detach()

    def discrimination(self, model: nn.Module, images: Tensor, fakes: Tensor) -> Tensor:
        """The discriminator's loss; both halves pass together, so that its weights are computed once."""
        real, fake = model.get_submodule("discriminator")(torch.cat([images, fakes])).split(len(images))
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def measure(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """The Fréchet distance of as many generated images as there are real ones; NaN where they are not finite."""
        features: tuple[list[Tensor], list[Tensor]] = ([], [])
        for images, noise in batches:
            network = self.classifier.to(images.device)
            features[0].append(network.features(images.float()))
            features[1].append(network.features(model.get_submodule("generator")(noise).float()))
        real, fake = map(torch.cat, features)
        return {self.metric: frechet.frechet_distance(real, fake) if fake.isfinite().all() else math.nan}

    def keep(self, model: nn.Module, folder: Path) -> None:
        """``samples.png``: 8 × 8 samples, from the same noise in every run."""
        from matplotlib.image import imsave

        noise = torch.randn(64, self.latent, generator=torch.Generator().manual_seed(0))
        device = next(model.parameters())
        samples = model.get_submodule("generator")(noise.to(device)).float().cpu()
        sheet = F.pad(samples, (1, 1, 1, 1), value=1.0).reshape(8, 8, self.size + 2, self.size + 2)
        sheet = sheet.transpose(1, 2).reshape(8 * (self.size + 2), -1)
        pixels = sheet.repeat_interleave(4, 0).repeat_interleave(4, 1)
        imsave(folder / "samples.png", pixels.numpy(), cmap="gray", vmin=-1, vmax=1)

    @cached_property
    def images(self) -> list[tuple[Tensor, Tensor]]:
        """Training, validation and test images ``(N, 1, size, size)`` in [−1, 1], and labels."""
        found = datasets.load(self.data, self.data_dir)
        (train, labels), *others = (tuple(part) for part in (found.train, found.validation, found.test))
        low, high, side = train.min(), train.max(), math.isqrt(train.shape[1])

        def scaled(x: Tensor) -> Tensor:
            return 2 * F.adaptive_avg_pool2d((x - low).reshape(-1, 1, side, side), self.size) / (high - low) - 1

        held_out = [(scaled(x[: self.held_out]), y[: self.held_out]) for x, y in others]
        return [(scaled(train), labels), *held_out]

    @cached_property
    def classifier(self) -> frechet.Classifier:
        """What gives the features."""
        return frechet.classifier(*self.images[0])


class Game(nn.Module):
    """``z → 2×2 → … → size×size`` and back to one number; the number of channels halves as the side doubles."""

    def __init__(self, size: int, width: int, latent: int, norm: str = "none") -> None:
        super().__init__()
        # Doublings of the side from 2×2 to size×size.
        levels = size.bit_length() - 2
        channels = [width * 2**level for level in range(levels)]
        generator: list[nn.Module] = [nn.Linear(latent, 4 * channels[-1]), nn.Unflatten(1, (channels[-1], 2, 2))]
        for wide, narrow in zip(channels[:0:-1], channels[-2::-1], strict=True):
            generator += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        generator += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh()]
        discriminator: list[nn.Module] = []
        for narrow, wide in zip([1, *channels[:-1]], channels, strict=True):
            discriminator.append(nn.Conv2d(narrow, wide, 4, 2, 1))
            discriminator += [] if norm == "none" else [norms.norm(norm, wide, 2)]
            discriminator.append(nn.LeakyReLU(0.2))
        discriminator += [nn.Flatten(), nn.Linear(4 * channels[-1], 1)]
        self.generator, self.discriminator = nn.Sequential(*generator), nn.Sequential(*discriminator)

    def forward(self, noise: Tensor) -> Tensor:
        """The discriminator's logits of generated images."""
        return self.discriminator(self.generator(noise))
