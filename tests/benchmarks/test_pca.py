"""Principal components by step methods, as their authors measured them: a short form of ``talk.py pca``."""

import importlib
from types import ModuleType

import pytest


@pytest.fixture
def pca() -> ModuleType:
    return importlib.import_module("claims.pca")  # late: it registers methods, of which no other test may know


def test_pogo_solves_components_of_condition_number_1000(pca) -> None:
    """Javaloy and Vergari (ICML 2026): a gap below 1e-6, three quarters of all components, momentum 0.3."""
    one = pca.Components("pogo", 60, 45, lr=4.0, momentum=0.3, seed=1000)
    assert one.until(1e-6, 4000, None, every=500)[1] < 1e-6


def test_landing_comes_to_the_gap_of_a_qr_retraction_in_about_as_many_steps(pca) -> None:
    """Ablin, Vary, Gao and Absil (JMLR 2024): cheaper steps, and no more than twice as many.

    Each at the best of rates a factor 2 apart; both must arrive.
    """
    steps = {
        method: min(pca.Components(method, 200, 40, lr).until(0.03, 1000, 128)[0] for lr in (0.06, 0.12))
        for method in ("landing", "QR", pca.GEOOPT)
    }
    assert steps["landing"] <= 2 * steps["QR"] <= 1000
    assert 0.5 <= steps["QR"] / steps[pca.GEOOPT] <= 2, "the same retraction by another library"
