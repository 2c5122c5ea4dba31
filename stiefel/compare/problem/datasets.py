"""Real data for the benchmarks: from local files, or downloaded with a message. Imports problem and the errors.

scikit-learn is imported where it is needed.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import sys
import urllib.error
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stiefel.compare.problem.problem import Data
from stiefel.errors import DataError, nearest_names

VARIABLE = "STIEFEL_DATA"
"""Environment variable: a folder with the data sets' folders."""
DEBIAN = Path("/usr/share/datasets")
"""Where Debian's packages put them."""

CHECKSUMS = {
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "mnist/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "mnist/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "mnist/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "mnist/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
    "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
"""SHA-256 or MD5 of each file, unpacked where it is gzipped."""

_PLACE = f"in a folder that {VARIABLE} names, or name the folder itself with --data-dir"
REMEDIES = {
    "fashion-mnist": "install Debian's package dataset-fashion-mnist (30 MB), or unpack it without root (apt-get "
    "download dataset-fashion-mnist; dpkg -x dataset-fashion-mnist*.deb DIR) and set "
    f"{VARIABLE}=DIR/usr/share/datasets, or --data-dir DIR/usr/share/datasets/fashion-mnist; on a connected machine, "
    "leave both out to fetch it from OpenML (30 MB)",
    "mnist": f"put its four idx files (12 MB), gzipped or not, into mnist/ {_PLACE}; torchvision.datasets.MNIST "
    "downloads them",
    "cifar-10-batches-py": f"unpack cifar-10-python.tar.gz (170 MB, www.cs.toronto.edu/~kriz/cifar.html) {_PLACE}",
    "cifar-100-python": f"unpack cifar-100-python.tar.gz (169 MB, www.cs.toronto.edu/~kriz/cifar.html) {_PLACE}",
    "olivetti": "fetch it on a connected machine (sklearn.datasets.fetch_olivetti_faces(), 4 MB) and copy its file "
    "olivetti_py3.pkz to scikit-learn's data folder here, or to the folder given with --data-dir",
}

Part = tuple[Tensor, Tensor]
Folder = str | Path | None


@dataclass(frozen=True)
class _Source:
    """How a data set is read: images ``(N, …)`` and labels, and a test part where it has one; the value of white; how
    many examples are held out to validate (and to test with, where there is no test part)."""

    read: Callable[[Folder], tuple[Part, Part | None]]
    white: int
    held_out: int


def load(name: str, folder: Folder = None, *, examples: int | None = None, split_seed: int = 0) -> Data:
    """A data set by name, its pixels between 0 and 1 less the mean of those that train, with splits fixed by a seed.

    Args:
        name: ``"digits"`` (8×8; comes with scikit-learn), ``"fashion-mnist"``, ``"mnist"``, ``"olivetti"`` (faces of 40
            persons, averaged to 32×32), ``"cifar-10"``, ``"cifar-100"``.
        folder: where its files are; default: its folder below that of the environment variable ``STIEFEL_DATA``, then
            where Debian's package puts it, then, for Fashion-MNIST and the faces, scikit-learn's downloads.
        examples: train on so many at most, and validate and test on a quarter as many at most.
        split_seed: fixes the split into training, validation and test data; not a run's seed.

    Returns:
        Images as rows of float32 (channels, then 32×32; 28×28 pixels are padded with zeros), and labels.

    Raises:
        DataError: unknown name, or files that are missing, corrupt or cannot be downloaded.
    """
    if name not in _SOURCES:
        raise DataError(f"unknown data set {name!r}; {nearest_names(name, _SOURCES)}")
    source = _SOURCES[name]
    (x, y), test = source.read(folder)
    # Held-out rows are taken before `examples` cuts: the split is the same for any number of them.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split_seed))
    if test is None:
        rows, order = order.split([source.held_out, len(order) - source.held_out])
        test = x[rows], y[rows]
    validation, train = order.split([source.held_out, len(order) - source.held_out])
    few = None if examples is None else max(1, examples // 4)
    parts = ((x[r], y[r]) for r in (train[:examples], validation[:few]))
    (x, y), (vx, vy), (tx, ty) = (
        (_rows(images) / source.white, labels.long()) for images, labels in (*parts, (test[0][:few], test[1][:few]))
    )
    # Of the training images alone: validation and test data stay unseen.
    mean = x.mean()
    return Data((x - mean, y), (vx - mean, vy), (tx - mean, ty))


def _rows(images: Tensor) -> Tensor:
    # (N, 28, 28) → (N, 32, 32) → (N, 1024). Digits (N, 64) and CIFAR (N, 3072) are rows already.
    if images.shape[-1] == 28:
        images = F.pad(images, (2, 2, 2, 2))
    return images.flatten(1).float()


def _digits(folder: Folder) -> tuple[Part, None]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (torch.from_numpy(images), torch.from_numpy(labels)), None


def _olivetti(folder: Folder) -> tuple[Part, None]:
    from sklearn.datasets import fetch_olivetti_faces

    where: Any = {"data_home": None if folder is None else str(folder)}
    # First without a download, so that the message is printed only where something is fetched.
    try:
        fetched = fetch_olivetti_faces(**where, download_if_missing=False)
    except OSError:
        print("fetching the Olivetti faces with scikit-learn (4 MB; kept in its data folder)", file=sys.stderr)
        try:
            fetched = fetch_olivetti_faces(**where)  # checks the file's checksum
        except (TimeoutError, urllib.error.URLError, OSError) as error:
            raise DataError(f"the Olivetti faces cannot be downloaded ({error}); {REMEDIES['olivetti']}") from error
    faces = F.avg_pool2d(torch.from_numpy(fetched.images)[:, None], 2)  # (400, 64, 64) → (400, 1, 32, 32)
    return (faces, torch.from_numpy(fetched.target)), None


def _idx(name: str) -> Callable[[Folder], tuple[Part, Part]]:
    def read(folder: Folder) -> tuple[Part, Part]:
        found = _find(name, folder)
        if found is None and name == "fashion-mnist":
            return _from_openml()
        if found is None:
            raise DataError(f"{name} is not on this machine; {REMEDIES[name]}")
        train, test = (
            (_idx_file(name, found, f"{part}-images-idx3-ubyte"), _idx_file(name, found, f"{part}-labels-idx1-ubyte"))
            for part in ("train", "t10k")
        )
        return train, test

    return read


def _idx_file(name: str, folder: Path, stem: str) -> Tensor:
    """An idx file of 28×28 images or of labels: a header of 4 bytes and of 4 for each dimension, then the entries."""
    # A copy: an array on a bytes object is read-only, which torch warns of.
    raw = np.frombuffer(_verified(name, folder, stem), dtype=np.uint8).copy()
    return torch.from_numpy(raw[16:].reshape(-1, 28, 28) if "images" in stem else raw[8:])


def _cifar(name: str, train: list[str], test: str, labels: bytes) -> Callable[[Folder], tuple[Part, Part]]:
    def read(folder: Folder) -> tuple[Part, Part]:
        found = _find(name, folder)
        if found is None:
            raise DataError(f"{name} is not on this machine; {REMEDIES[name]}")

        def part(stems: list[str]) -> Part:
            # Pickles can run code: only files with the known checksums are loaded.
            # encoding: they were written by Python 2, whose strings become bytes, hence the keys.
            batches = [pickle.loads(_verified(name, found, stem), encoding="bytes") for stem in stems]
            # (N, 3072) uint8: 32×32 red values, then green, then blue.
            images = np.concatenate([batch[b"data"] for batch in batches])
            return torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch[labels]])

        return part(train), part([test])

    return read


def _find(name: str, folder: Folder) -> Path | None:
    """The folder of a data set: the one given, else the first of the usual places that exists."""
    if folder is not None:
        return Path(folder)
    roots = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    return next((root / name for root in (*roots, DEBIAN) if (root / name).is_dir()), None)


def _verified(name: str, folder: Path, stem: str) -> bytes:
    """The unpacked content of a file; raises where it is missing or its checksum is another."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder / stem}(.gz) is missing; {REMEDIES[name]}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is corrupt ({error}); {REMEDIES[name]}") from error
    expected = CHECKSUMS[f"{name}/{stem}"]
    kind = "md5" if len(expected) == 32 else "sha256"  # 32 hexadecimal digits, or 64
    # usedforsecurity: Python builds in FIPS mode refuse MD5 otherwise.
    found = hashlib.new(kind, raw, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is corrupt, or another file of that name: its {kind} is {found}, not {expected}; {REMEDIES[name]}"
        )
    return raw


def _from_openml() -> tuple[Part, Part]:
    from sklearn.datasets import fetch_openml

    print("fetching Fashion-MNIST from OpenML (30 MB; kept in scikit-learn's data folder)", file=sys.stderr)
    try:  # ValueError: the download does not have OpenML's checksum
        fetched = fetch_openml("Fashion-MNIST", version=1, as_frame=False, parser="liac-arff")
    except (TimeoutError, urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(
            f"Fashion-MNIST is not here and cannot be downloaded from OpenML ({error}); {REMEDIES['fashion-mnist']}"
        ) from error
    # 70,000 images in one array, the test part last.
    x, y = torch.from_numpy(fetched.data).reshape(-1, 28, 28), torch.from_numpy(fetched.target.astype("int64"))
    return (x[:60_000], y[:60_000]), (x[60_000:], y[60_000:])


_SOURCES = {
    "digits": _Source(_digits, 16, 360),
    "fashion-mnist": _Source(_idx("fashion-mnist"), 255, 10_000),
    "mnist": _Source(_idx("mnist"), 255, 10_000),
    "olivetti": _Source(_olivetti, 1, 80),
    "cifar-10": _Source(
        _cifar("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"), 255, 5_000
    ),
    "cifar-100": _Source(_cifar("cifar-100-python", ["train"], "test", b"fine_labels"), 255, 5_000),
}
