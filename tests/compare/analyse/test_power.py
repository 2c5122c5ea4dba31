"""The smallest difference that a design finds, against the noncentral t distribution by another route."""

import numpy as np
import pytest
from scipy.stats import beta, nct, t

from stiefel.compare.analyse.statistics.differences import NODES, POWER, detectable


@pytest.mark.parametrize("n", [5, 10, 20, 100])
@pytest.mark.parametrize("pairs", [1, 9, 190, 7600])
def test_a_detectable_difference_is_found_four_times_in_five(n, pairs):
    """Also in large families, where the power at the end of the search is 1 to rounding."""
    nu = n - 1
    shift = detectable(1.0, n, pairs) / np.sqrt(2 / n)
    r = beta.ppf((np.arange(NODES) + 0.5) / NODES, nu / 2, nu / 2)
    critical = t.ppf(1 - 0.05 / pairs / 2, nu / (r**2 + (1 - r) ** 2))
    assert np.mean(nct.sf(critical, 2 * nu, shift)) == pytest.approx(POWER, abs=1e-9)
