"""Angles between subspaces, against scipy and against angles that are known because they were made."""

import pytest
import scipy.linalg
import torch

import stiefel
from stiefel.measure import principal_angles


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("p", "q", "n"), [(3, 3, 9), (2, 4, 9), (4, 2, 9), (1, 1, 5), (5, 5, 8)])
def test_they_are_scipys(p, q, n):
    a, b = gaussian(p, n), gaussian(q, n, seed=1)
    expected = scipy.linalg.subspace_angles(a.T.numpy(), b.T.numpy())[::-1].copy()
    torch.testing.assert_close(principal_angles(a, b), torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(principal_angles(b.T, a), torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 0.5, 1.0, 1.5, 1.5707963])
def test_small_and_large_ones_keep_their_digits(angle):
    q = torch.linalg.qr(gaussian(6, 6))[0]
    angles = torch.tensor([angle / 2, angle], dtype=torch.float64)
    a = q[:2]
    b = angles.cos()[:, None] * q[:2] + angles.sin()[:, None] * q[2:4]
    found = principal_angles(gaussian(2, 2, seed=2) @ a, b)
    torch.testing.assert_close(found, angles, rtol=1e-7, atol=2e-15)


def test_equal_subspaces_have_none_and_stacks_are_taken_one_by_one():
    a = gaussian(4, 3, 7)
    assert principal_angles(a, gaussian(4, 3, 3, seed=1) @ a).abs().max() < 1e-13
    assert principal_angles(a, gaussian(4, 2, 7, seed=2)).shape == (4, 2)
    assert principal_angles(a.float(), a.to(torch.float32)).dtype == torch.float64


def test_different_spaces_are_refused():
    with pytest.raises(stiefel.LayoutError, match="dimensions 9 and 8"):
        principal_angles(gaussian(3, 9), gaussian(3, 8))


def test_what_spans_less_than_it_seems_is_refused():
    a = torch.eye(3, dtype=torch.float64)
    with pytest.raises(stiefel.LayoutError, match="linearly dependent"):
        principal_angles(a[[0, 0]], a[[0, 2]])
    with pytest.raises(stiefel.LayoutError, match=r"a vector is x\[None\]"):
        principal_angles(a[0], a[1])
