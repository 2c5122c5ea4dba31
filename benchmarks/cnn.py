"""Orthogonal convolutions: the networks of Huang et al. (AAAI 2018), with all, the first, or the first few constrained.

VGG-style, batch-normalized Inception, and wide ResNet, filters orthonormal in groups of 64; the fully connected layers
and the ResNet's shortcuts are free. Fashion-MNIST by default, CIFAR-10 and CIFAR-100 where their files are.

    stiefel compare benchmarks/cnn.py --budget small --layers all first first2 first4
    stiefel compare benchmarks/cnn.py --budget small --net inception wrn
    stiefel compare benchmarks/cnn.py --budget small --norm none batch group --groups 1 16 32 64
    stiefel compare benchmarks/cnn.py --budget paper --data cifar-10 --net wrn --batch-size 128 --epochs 200

The paper's learning rate is 0.05 for `vgg` and 0.1 for the others; its batches have 256 images for `vgg`, 64 for
`inception`, 128 for `wrn`. At `small` widths are an eighth, images 16×16, and `inception` takes eight times as long as
`vgg`: add --pixels 8 --epochs 3 --batch-size 64 for it and `wrn`.

`aoc` makes the convolutions of `vgg` orthogonal as operators on images, which orthonormal kernels are not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from parts.aoc import AOC
from parts.convnets import inception, vgg, wide_resnet
from parts.groups import constrain_in_groups
from torch import Tensor, nn
from torch.optim import lr_scheduler

import stiefel
from stiefel.compare import Data, Problem, datasets, where

FIRST = {"all": None, "first": 1, "first2": 2, "first4": 4}


@dataclass(frozen=True, kw_only=True)
class CNN(Problem):
    """A convolutional network on small images."""

    net: str = "vgg"
    layers: str = "all"  # type: ignore[misc]  # which convolutions are constrained: all, first, first2, first4
    groups: int = 64  # outputs whose filters are orthonormal to each other; fewer where a layer has no room for them
    width: float = 0.125  # times the paper's numbers of filters
    depth: int = 10  # of the wide ResNet, 6n + 4
    epochs: int = 10
    pixels: int = 32  # a side: images are averaged to so many, or cut to the 28 that the padding surrounds
    norm: str | None = (
        None  # of activations: none, batch, layer, group, instance, whitening; default: the network's own
    )
    norm_place: str = "after"  # or before: the convolutions of vgg and inception; in wrn it is before, with the ReLU
    augment: bool = False  # flips, and shifts by up to 4 pixels
    data: str = "digits"
    examples: int | None = None  # of the training data at most; a quarter as many to validate and test with
    data_dir: str | None = where(None, "folder with the files of the data set")

    hyper: ClassVar = {"momentum": 0.9, "weight_decay": 5e-4}
    learning_rates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    default_rate = 0.05
    evaluation_batch = 1024
    budgets: ClassVar = {
        "tiny": {
            "epochs": (1,), "width": (0.03125,), "net": ("vgg", "inception", "wrn"), "examples": (256,),
            "batch_size": (64,),
        },
        "small": {
            "data": ("fashion-mnist",), "examples": (2048,), "epochs": (5,), "batch_size": (32,), "pixels": (16,),
        },
        "paper": {
            "data": ("fashion-mnist",), "epochs": (100,), "batch_size": (256,), "width": (1.0,), "depth": (28,),
            "augment": (True,),
        },
    }  # fmt: skip

    def make_model(self) -> nn.Module:
        """The network."""
        channels = 3 if self.data.startswith("cifar") else 1
        classes = 100 if self.data == "cifar-100" else 10
        norm = self.norm or {"vgg": "none"}.get(self.net, "batch")
        if self.net == "wrn":
            return wide_resnet(channels, classes, self.width, self.depth, norm)
        return {"vgg": vgg, "inception": inception}[self.net](channels, classes, self.width, norm, self.norm_place)

    def constrain(self, model: nn.Module, method: stiefel.Constraint) -> nn.Module:
        """The first convolutions, or all, in groups."""
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d) and not name.endswith("shortcut")
        ]
        chosen = names[: FIRST[self.layers]]
        if isinstance(method, AOC):  # whose kernels are orthogonal as operators, not row by row
            return stiefel.constrain(model, method, layers=chosen)
        return constrain_in_groups(model, method, chosen, self.groups)

    def make_data(self) -> Data:
        """Images ``(channels, pixels, pixels)`` of mean 0 and variance 1."""
        data = datasets.load(self.data, self.data_dir, examples=self.examples)
        parts = [(self._images(x), y) for x, y in (data.train, data.validation, data.test)]
        deviation = parts[0][0].std()
        train, validation, test = ((x / deviation, y) for x, y in parts)
        return Data(Augmented(*train, self.batch_size) if self.augment else train, validation, test)

    def schedule(self, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        """Exponential decay to a hundredth; for the wide ResNet a fifth after 30, 60 and 80 % of the epochs."""
        if self.net == "wrn":
            return lr_scheduler.MultiStepLR(optimizer, [round(self.epochs * part) for part in (0.3, 0.6, 0.8)], 0.2)
        return lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / self.epochs))

    @property
    def target(self) -> float:  # type: ignore[override]
        """Validation accuracy that a run must reach."""
        few = self.examples is not None
        return {"digits": 0.95, "cifar-10": 0.85, "cifar-100": 0.6}.get(self.data, 0.7 if few else 0.9)

    def _images(self, rows: Tensor) -> Tensor:
        side = 8 if self.data == "digits" else 32
        images = rows.reshape(len(rows), -1, side, side)
        if self.pixels == 28 < side:
            return images[:, :, 2:-2, 2:-2]
        return F.avg_pool2d(images, side // self.pixels) if self.pixels < side else images


class Augmented:
    """Shuffled batches of images, each flipped or not, and shifted by up to 4 pixels over its mirrored border."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        side = self.images.shape[-1]
        for rows in torch.randperm(len(self.labels))[: len(self) * self.batch_size].split(self.batch_size):
            flip = (torch.rand(len(rows)) < 0.5)[:, None, None, None]
            images = self.images[rows]
            padded = F.pad(torch.where(flip, images.flip(-1), images), (4, 4, 4, 4), mode="reflect")
            # Row i, column j of the cut, for each image by its own shift: (b, side) indices of either.
            down, right = (torch.randint(0, 9, (len(rows), 1)) + torch.arange(side) for _ in range(2))
            cut = padded.transpose(0, 1)[:, torch.arange(len(rows))[:, None, None], down[:, :, None], right[:, None, :]]
            yield cut.transpose(0, 1), self.labels[rows]
