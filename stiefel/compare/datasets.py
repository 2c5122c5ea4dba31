"""Real data for the benchmarks: digits and Fashion-MNIST. Imports scikit-learn (lazily), numpy, and the errors."""

from __future__ import annotations

import gzip
import struct
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stiefel.compare.problem import Data
from stiefel.errors import DataError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_REMEDY = (
    "install Debian's package dataset-fashion-mnist, or unpack it without root (apt-get download "
    "dataset-fashion-mnist; dpkg -x dataset-fashion-mnist*.deb DIR) and give --data-dir "
    "DIR/usr/share/datasets/fashion-mnist; or, on a connected machine, leave --data-dir out to fetch it from OpenML "
    "(30 MB)"
)


def load(name: str, folder: str | Path | None = None, *, split_seed: int = 0) -> Data:
    """A data set by name: ``"digits"`` or ``"fashion-mnist"``, centred, with splits fixed by a seed.

    Args:
        name: which one.
        folder: where the idx files of Fashion-MNIST are; default: where Debian's package puts them, then OpenML.
        split_seed: fixes the split into training, validation and test data; not a run's seed.

    Returns:
        Images as rows of float32 (8×8 for digits, padded to 32×32 for Fashion-MNIST), and labels.

    Raises:
        DataError: unknown name, missing or corrupt files, or out of reach.
    """
    if name == "digits":
        return _digits(split_seed)
    if name == "fashion-mnist":
        return _fashion_mnist(folder, split_seed)
    raise DataError(f"unknown data {name!r}; known: 'digits', 'fashion-mnist'")


def _digits(split_seed: int) -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    test, validation, train = order.split([360, 360, len(y) - 720])
    return _centred(x[train], y[train], x[validation], y[validation], x[test], y[test])


def _fashion_mnist(folder: str | Path | None, split_seed: int) -> Data:
    if folder is not None or FASHION_MNIST.is_dir():
        x, y, test_x, test_y = _read_folder(Path(folder or FASHION_MNIST))
    else:
        x, y, test_x, test_y = _from_openml()
    x, test_x = (F.pad(images.reshape(-1, 28, 28), (2, 2, 2, 2)).reshape(-1, 1024) for images in (x, test_x))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    validation, train = order[:10_000], order[10_000:]
    return _centred(x[train], y[train], x[validation], y[validation], test_x, test_y)


def _centred(x: Tensor, y: Tensor, vx: Tensor, vy: Tensor, tx: Tensor, ty: Tensor) -> Data:
    mean = x.mean()  # of the training data alone
    return Data((x - mean, y), (vx - mean, vy), (tx - mean, ty))


def _read_folder(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = []
    for images, labels in _IDX_FILES.values():
        x, y = _read_idx(folder, images), _read_idx(folder, labels)
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise DataError(f"{folder}: {images} {x.shape} and {labels} {y.shape} do not belong together; {_REMEDY}")
        parts += [torch.from_numpy(x).float() / 255, torch.from_numpy(y).long()]
    return parts[0], parts[1], parts[2], parts[3]


def _read_idx(folder: Path, stem: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One idx file, gzipped or not: two zero bytes, the type, the rank, the sizes (big-endian), the entries."""
    path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder / stem}(.gz) is missing; {_REMEDY}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, rank = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
        if zero != 0 or kind != 8:
            raise ValueError("it does not start as an idx file of bytes does")
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path} is corrupt ({error}); {_REMEDY}") from error


def _from_openml() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import fetch_openml

    print("fetching Fashion-MNIST from OpenML (30 MB; kept in scikit-learn's data folder)", file=sys.stderr)
    try:
        fetched = fetch_openml("Fashion-MNIST", version=1, as_frame=False, parser="liac-arff")
    except (TimeoutError, urllib.error.URLError, OSError) as error:
        raise DataError(
            f"Fashion-MNIST is not in {FASHION_MNIST} and OpenML is out of reach ({error}); {_REMEDY}"
        ) from error
    x, y = torch.from_numpy(fetched.data).float() / 255, torch.from_numpy(fetched.target.astype("int64"))
    return x[:60_000], y[:60_000], x[60_000:], y[60_000:]
