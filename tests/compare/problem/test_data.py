"""Problem files and data sets: what loads, and what is refused by name."""

import gzip
import hashlib
import pickle
import struct
import types
import urllib.error

import numpy as np
import pytest
import torch
from common import FAULTY

import stiefel
from stiefel.compare import datasets, load_problem


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "no problem"),
        ("import does_not_exist", "fails on import"),
        (FAULTY + FAULTY.replace("class Toy", "class Other"), "2 problems"),
        ("from stiefel.compare import Problem\nclass P(Problem): pass", "does not define make_data, make_model"),
    ],
)
def test_a_file_without_a_usable_problem(tmp_path, source, words):
    path = tmp_path / "p.py"
    path.write_text(source)
    with pytest.raises(stiefel.ProblemError, match=words):
        load_problem(path)


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(stiefel.ProblemError, match="no problem file"):
        load_problem(tmp_path / "missing.py")


def test_digits_are_split_once_and_centred():
    data = datasets.load("digits")
    assert [len(y) for _, y in (data.train, data.validation, data.test)] == [1077, 360, 360]
    rows = torch.cat([data.train[0], data.validation[0], data.test[0]])
    assert len(torch.unique(rows, dim=0)) == 1797  # no image is in two parts
    assert abs(data.train[0].mean().item()) < 1e-6
    again = datasets.load("digits")
    assert torch.equal(data.test[0], again.test[0])
    assert not torch.equal(data.test[1], datasets.load("digits", split_seed=1).test[1])


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder in the form of Fashion-MNIST, small: one training part plain, the rest gzipped; with its checksums."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte", rng.integers(0, 256, (10_020, 28, 28)))
    write_idx(folder / "train-labels-idx1-ubyte.gz", rng.integers(0, 10, 10_020))
    write_idx(folder / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (7, 28, 28)))
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", rng.integers(0, 10, 7))
    for path in folder.iterdir():
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        key = f"fashion-mnist/{path.name.removesuffix('.gz')}"
        monkeypatch.setitem(datasets.CHECKSUMS, key, hashlib.sha256(raw).hexdigest())
    return folder


def test_fashion_mnist_from_idx_files(fashion):
    data = datasets.load("fashion-mnist", fashion)
    assert data.train[0].shape == (20, 1024)
    assert data.validation[0].shape == (10_000, 1024)
    assert data.test[0].shape == (7, 1024)
    raw = gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    image = data.test[0][0].reshape(32, 32)
    background = image[0, 0]  # a padded zero, less the mean
    assert torch.allclose(image[2:30, 2:30].flatten() - background, torch.tensor(list(raw[:784])) / 255, atol=1e-6)


def test_a_part_of_it(fashion):
    """The first of each part, so that more examples only add to what fewer have; less the mean of what trains."""
    whole, part = datasets.load("fashion-mnist", fashion), datasets.load("fashion-mnist", fashion, examples=8)
    assert [len(y) for _, y in (part.train, part.validation, part.test)] == [8, 2, 2]
    for few, all_ in ((part.train, whole.train), (part.validation, whole.validation), (part.test, whole.test)):
        assert torch.equal(few[1], all_[1][: len(few[1])])
        difference = few[0] - all_[0][: len(few[1])]
        assert torch.allclose(difference, difference[0, 0], atol=1e-6)
    assert abs(part.train[0].mean().item()) < 1e-6


def test_the_environment_says_where_data_are(fashion, tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    fashion.rename(root / "fashion-mnist")
    monkeypatch.setenv(datasets.VARIABLE, str(root))
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    assert len(datasets.load("fashion-mnist").test[1]) == 7


@pytest.mark.parametrize(("name", "remedy"), [("mnist", "idx files"), ("cifar-10", "cifar-10-python.tar.gz")])
def test_data_that_nothing_downloads_say_where_to_get_them(name, remedy, tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(stiefel.DataError, match=remedy):
        datasets.load(name)


def test_cifar_from_its_own_files_and_no_other_pickle_is_loaded(tmp_path, monkeypatch):
    rng, stems = np.random.default_rng(0), {"train": 5_004, "test": 3}
    batches = {}
    for stem, count in stems.items():
        batch = {b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), b"fine_labels": [7] * count}
        batches[stem] = pickle.dumps(batch)
        (tmp_path / stem).write_bytes(batches[stem])
        digest = hashlib.md5(batches[stem]).hexdigest()
        monkeypatch.setitem(datasets.CHECKSUMS, f"cifar-100-python/{stem}", digest)
    data = datasets.load("cifar-100", tmp_path)
    assert [x.shape for x, _ in (data.train, data.validation, data.test)] == [(4, 3072), (5_000, 3072), (3, 3072)]
    assert set(data.train[1].tolist()) == {7}

    class Trap:
        def __reduce__(self):
            return exec, ("raise AssertionError('it was loaded')",)

    (tmp_path / "test").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(stiefel.DataError, match=r"test is corrupt, or another file of that name: its md5"):
        datasets.load("cifar-100", tmp_path)


def test_faces_are_averaged_and_told_before_they_are_fetched(monkeypatch, capsys):
    import sklearn.datasets

    def fetch(data_home=None, download_if_missing=True):
        if not download_if_missing:
            raise OSError("Data not found and `download_if_missing` is False")
        assert "4 MB" in capsys.readouterr().err
        images = np.arange(400 * 64 * 64, dtype=np.float32).reshape(400, 64, 64) % 7 / 7
        return types.SimpleNamespace(images=images, target=np.arange(400) // 10)

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", fetch)
    data = datasets.load("olivetti")
    assert [x.shape for x, _ in (data.train, data.validation, data.test)] == [(240, 1024), (80, 1024), (80, 1024)]

    def offline(data_home=None, download_if_missing=True):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", offline)
    with pytest.raises(stiefel.DataError, match=r"olivetti_py3\.pkz"):
        datasets.load("olivetti")


@pytest.mark.parametrize("damage", ["missing", "truncated", "not gzip", "not idx", "other length", "one bit"])
def test_missing_or_corrupt_files_name_the_file_and_the_remedy(fashion, damage):
    path = fashion / "train-labels-idx1-ubyte.gz"
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other length":
        write_idx(path, np.zeros(5))
    elif damage == "one bit":
        content = bytearray(gzip.decompress(raw))
        content[-1] ^= 1
        path.write_bytes(gzip.compress(bytes(content)))
    else:
        path.write_bytes({"truncated": raw[:40], "not gzip": b"hello" * 9, "not idx": gzip.compress(b"x" * 99)}[damage])
    with pytest.raises(stiefel.DataError, match="train-labels-idx1-ubyte") as caught:
        datasets.load("fashion-mnist", fashion)
    assert "dataset-fashion-mnist" in str(caught.value)


def test_offline_without_files_says_what_to_do(monkeypatch, tmp_path, capsys):
    import sklearn.datasets

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(stiefel.DataError, match="cannot be downloaded from OpenML") as caught:
        datasets.load("fashion-mnist")
    assert "30 MB" in capsys.readouterr().err  # told before anything is downloaded
    assert "apt-get download dataset-fashion-mnist" in str(caught.value)


def test_unknown_data():
    with pytest.raises(stiefel.DataError, match="did you mean 'mnist'"):
        datasets.load("mnist1d")
