"""The law of conformance: what every method must do, with its options, in every precision, on every device.

    after any training, copy, save or load:   ‖XXᵀ − I‖_F ≤ claim,  X = W/s,   and the same W as without the detour

``conformance.CHECKS`` lists what that comes to. Each check trains a model with a weight of every layout (see
``conformance.Zoo``).
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
PLAIN = [conformance.variants(name)[0] for name in stiefel.available()]
FORMS = [method for method in METHODS if method not in PLAIN]
OF_STATE = ("copy", "groups", "late_gradient", "momentum", "release", "resume", "seed")
"""Checks of what is kept and by whom: usually in single precision alone, where a claim is hardest too."""
SINGLE, DOUBLE = (torch.float32, torch.complex64), (torch.float64, torch.complex128)
IN_DOUBLE = ("law", "gradient")  # differences of functions, which single precision could not tell from rounding


def dtypes(check: str, method: stiefel.Constraint) -> list[torch.dtype]:
    """Those in which a check means something for a method."""
    if check == "fixed_points":  # which makes a model of its own
        return [torch.float64]
    return [d for d in method.dtypes if check not in IN_DOUBLE or d in DOUBLE]


def is_quick(check: str, dtype: torch.dtype) -> bool:
    return dtype in SINGLE or not (check == "claim" or check in OF_STATE)


def conforms(check: str, method: stiefel.Constraint, device: torch.device) -> None:
    for dtype in dtypes(check, method):
        if is_quick(check, dtype):
            conformance.run(method, check, dtype, device)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("method", PLAIN, ids=str)
@pytest.mark.parametrize("check", [check for check in conformance.CHECKS if check != "fixed_points"])
def test_conforms(check: str, method: stiefel.Constraint, device: torch.device) -> None:
    conforms(check, method, device)


@pytest.mark.sampled(24)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("method", FORMS, ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_other_forms_conform(check: str, method: stiefel.Constraint, device: torch.device) -> None:
    conforms(check, method, device)


@pytest.mark.sampled(8, values=False)  # test_fixed_points.py has the whole law
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("method", PLAIN, ids=str)
def test_fixed_points_conform(method: stiefel.Constraint, device: torch.device) -> None:
    conforms("fixed_points", method, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("check", ["claim", *OF_STATE])
def test_conforms_in_the_other_precisions(check: str, method: stiefel.Constraint, device: torch.device) -> None:
    for dtype in dtypes(check, method):
        if not is_quick(check, dtype):
            conformance.run(method, check, dtype, device)
