"""The conformance suite over the catalogue: every method, with its options, in every precision, on every device.

Layouts are inside the checks: they train a model with a weight of each (see ``conformance.Zoo``).
"""

import conformance
import pytest
import torch

import stiefel

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
METHODS = [method for name in stiefel.available() for method in conformance.variants(name)]
OF_STATE = ("copy", "groups", "late_gradient", "momentum", "release", "resume", "seed")
"""Checks of what is kept and by whom, which is the same in every precision."""
IN_DOUBLE = ("law", "gradient")  # differences of functions, which single precision could not tell from rounding


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check: str, method: stiefel.Constraint, device: torch.device) -> None:
    dtypes = list(method.dtypes)
    if check in IN_DOUBLE:
        dtypes = [d for d in dtypes if d in (torch.float64, torch.complex128)]
    elif check == "fixed_points":  # which makes a model of its own, in double
        dtypes = [torch.float64]
    elif check == "claim" or check in OF_STATE:  # in single precision, where a claim is hardest
        dtypes = [d for d in dtypes if d in (torch.float32, torch.complex64)]
    for dtype in dtypes:
        conformance.run(method, check, dtype, device)
