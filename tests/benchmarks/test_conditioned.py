"""What normalization does to the conditioning of a deep MLP: a short form of ``talk.py conditioning``."""

import importlib
from statistics import mean

import pytest


@pytest.fixture
def measured():
    """Of the last hidden layer's inputs at the start: effective rank and κ over nonzero eigenvalues, over two seeds."""
    claim = importlib.import_module("claims.conditioning")  # late: it registers methods

    def of(kind: str) -> tuple[float, float]:
        method, options, norm = claim.KINDS[kind]
        last = [
            claim._measured(claim.Run(claim.SHOWN.problem(norm=norm), method, 0.1, seed, options))[-1]
            for seed in (100, 101)
        ]
        return mean(row["rank"] for row in last), mean(row["inputs"] for row in last)

    return of


def test_normalized_inputs_keep_the_rank_that_depth_collapses(measured) -> None:
    """Huang et al. (CVPR 2018, CVPR 2019): normalized layers are conditioned better by orders of magnitude."""
    (start, _), (orthogonal, condition) = measured("as torch starts"), measured("orthogonal start, √2")
    assert start < 1.1
    assert 1.1 < orthogonal < 2
    for kind in ("batch normalization", "whitening"):
        rank, kappa = measured(kind)
        assert rank > 4 * orthogonal
        assert kappa < condition / 100
