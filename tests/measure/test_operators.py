"""Singular values of convolutions on images: against the matrix of the operator, and what is known of kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import stiefel
from stiefel.measure import OperatorSpectrum, operator_spectrum
from stiefel.measure.model import operators

EPS = torch.finfo(torch.float64).eps


def matrix(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The layer's own answers to all unit images, without the bias."""
    x = torch.eye(layer.in_channels * math.prod(size), dtype=layer.weight.dtype).reshape(-1, layer.in_channels, *size)
    with torch.no_grad():
        return (layer(x) - layer(torch.zeros_like(x[:1]))).flatten(1)


def spectrum_of(layer: nn.Module, size: tuple[int, ...], **options: object) -> OperatorSpectrum:
    x = torch.zeros(1, layer.in_channels, *size, dtype=layer.weight.dtype)
    return operator_spectrum(layer, lambda: layer(x), unconstrained=True, **options)["weight"]


CIRCULAR = {"padding_mode": "circular"}
EXACT = {
    "1d": (lambda: nn.Conv1d(3, 5, 3, padding=1, **CIRCULAR), (7,)),
    "1d, fewer outputs": (lambda: nn.Conv1d(5, 2, 5, padding=2, **CIRCULAR), (8,)),
    "1d, stride and groups": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2, groups=2, **CIRCULAR), (8,)),
    "1d, stride 3, even kernel": (lambda: nn.Conv1d(2, 9, 4, padding=1, stride=3, **CIRCULAR), (9,)),
    "1d, dilation": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2, **CIRCULAR), (8,)),
    "1d, dilation and stride": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, stride=2, **CIRCULAR), (8,)),
    "1d, kernel as long as the image": (lambda: nn.Conv1d(2, 3, 7, padding=3, **CIRCULAR), (4,)),
    "2d": (lambda: nn.Conv2d(2, 3, 3, padding=1, **CIRCULAR), (5, 6)),
    "2d, unlike sides": (lambda: nn.Conv2d(2, 3, (3, 1), padding=(1, 0), **CIRCULAR), (5, 6)),
    "2d, stride": (lambda: nn.Conv2d(2, 10, 3, padding=1, stride=2, **CIRCULAR), (6, 4)),
    "2d, unlike strides": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=(2, 1), **CIRCULAR), (6, 5)),
    "2d, same": (lambda: nn.Conv2d(4, 2, 3, padding="same", groups=2, dilation=2, **CIRCULAR), (6, 5)),
    "2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, **CIRCULAR), (4, 4)),
    "3d": (lambda: nn.Conv3d(2, 2, 3, padding=1, **CIRCULAR), (3, 4, 3)),
    "complex": (lambda: nn.Conv1d(2, 3, 3, padding=1, dtype=torch.complex128, **CIRCULAR), (5,)),
    "1x1": (lambda: nn.Conv2d(2, 3, 1), (4, 5)),
    "tiles": (lambda: nn.Conv2d(2, 3, 2, stride=2), (6, 4)),
    "tiles, a rest": (lambda: nn.Conv2d(1, 5, 2, stride=2), (5, 5)),
    "gaps": (lambda: nn.Conv2d(2, 3, 2, stride=3), (7, 6)),
    "gaps, a cut one": (lambda: nn.Conv1d(1, 4, 1, stride=2), (5,)),
    "gaps, dilation": (lambda: nn.Conv1d(2, 7, 2, dilation=2, stride=3), (10,)),
    "transposed tiles": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (3, 4)),
    "transposed gaps": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=3, output_padding=1), (3, 4)),
}
PADDED = {
    "zeros": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 6)),
    "zeros, 1d": (lambda: nn.Conv1d(3, 8, 4, padding=2, stride=3), (10,)),
    "zeros, stride": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (5, 6)),
    "none": (lambda: nn.Conv2d(2, 3, 3), (5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), (5, 6)),
    "replicate": (lambda: nn.Conv2d(2, 6, 3, padding=1, padding_mode="replicate", groups=2, dilation=2), (5, 6)),
    "circular, part of a stride": (lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2, **CIRCULAR), (7,)),
    "circular, a smaller image": (lambda: nn.Conv1d(2, 3, 5, padding=1, **CIRCULAR), (7,)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4)),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, dilation=3, output_padding=2), (5,)),
    "complex": (lambda: nn.Conv1d(2, 3, 3, padding=1, dtype=torch.complex128), (5,)),
    "3d": (lambda: nn.Conv3d(2, 2, 3, padding=1), (3, 4, 3)),
}


def made(cases: dict, case: str) -> tuple[nn.Module, tuple[int, ...], Tensor]:
    torch.manual_seed(0)
    make, size = cases[case]
    layer = make()
    layer = layer if layer.weight.is_complex() else layer.double()
    return layer, size, torch.linalg.svdvals(matrix(layer, size))


@pytest.mark.parametrize("case", EXACT)
def test_frequencies_give_all_singular_values(case: str) -> None:
    layer, size, known = made(EXACT, case)
    found = spectrum_of(layer, size, exact_to=0)
    assert found.how == "frequencies"
    assert found.values is not None
    assert found.values.numpy() == pytest.approx(known.numpy(), abs=100 * EPS * known[0].item())
    assert found.largest == found.values[0].item()
    assert found.smallest == found.values[-1].item()
    assert (found.size, found.reason) == (size, None)


@pytest.mark.parametrize("case", PADDED)
def test_other_operators_are_written_out_or_have_their_largest_found(case: str) -> None:
    layer, size, known = made(PADDED, case)
    small, large = spectrum_of(layer, size), spectrum_of(layer, size, exact_to=0)
    assert small.how == "matrix"
    assert small.values.numpy() == pytest.approx(known.numpy(), abs=100 * EPS * known[0].item())
    assert small.smallest == small.values[-1].item()
    assert large.how == "lanczos"
    assert large.largest == pytest.approx(known[0].item(), rel=5e-5)
    assert large.largest <= known[0].item() * (1 + 100 * EPS)
    assert (large.smallest, large.values) == (None, None)
    assert "circular padding" in large.reason
    assert large.kernel == small.kernel


def test_the_largest_of_a_cluster_is_found_on_a_larger_image() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False).double()
    nn.init.orthogonal_(layer.weight)
    known = torch.linalg.svdvals(matrix(layer, (12, 12)))
    assert spectrum_of(layer, (12, 12)).largest == pytest.approx(known[0].item(), rel=5e-5)
    reach = spectrum_of(layer, (14, 14), circular=True)
    assert known[0].item() <= reach.largest  # whose part it is


@pytest.mark.parametrize("k", [2, 3, 5])
def test_an_orthonormal_kernel_may_have_an_operator_of_norm_k(k: int) -> None:
    layer = nn.Conv2d(1, 1, k, padding=k // 2, bias=False).double()
    nn.init.constant_(layer.weight, 1 / k)
    wrapped = spectrum_of(layer, (24, 24), circular=True)
    assert wrapped.kernel == pytest.approx(1)
    assert wrapped.largest == pytest.approx(k, rel=1e-12)  # at frequency zero
    assert k * 0.95 < spectrum_of(layer, (24, 24)).largest < k
    tiles = nn.Conv2d(1, 1, k, stride=k, bias=False).double()
    tiles.load_state_dict(layer.state_dict())
    assert spectrum_of(tiles, (6 * k, 6 * k)).largest == pytest.approx(1)


@pytest.mark.parametrize("method", ["own", "soft"])
def test_orthonormal_kernels_lie_between_one_and_k(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 2, 6, 6))
    stiefel.constrain(model, method, scale=2.0)
    with torch.no_grad():
        found = operator_spectrum(model, lambda: model(torch.randn(3, 2, 6, 6)))
    assert list(found) == ["0.weight", "2.weight"]  # in float32, of convolutions alone
    assert found["0.weight"].kernel == pytest.approx(2, rel=1e-6)
    assert 2 < found["0.weight"].largest < 6
    one = found["2.weight"]
    assert (one.largest, one.smallest) == (pytest.approx(2, rel=1e-6), pytest.approx(2, rel=1e-6))
    assert not model[0]._forward_hooks


def test_a_transposed_kernel_is_read_as_constraints_do() -> None:
    torch.manual_seed(0)
    layer = stiefel.constrain(nn.ConvTranspose2d(4, 3, 3, stride=2), "projection").double()
    assert spectrum_of(layer, (4, 4)).kernel == pytest.approx(1, rel=1e-6)


def test_circular_takes_any_convolution_as_a_periodic_one() -> None:
    torch.manual_seed(0)
    padded, periodic = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1, **CIRCULAR)
    periodic.load_state_dict(padded.state_dict())
    other = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)
    other.weight = padded.weight
    values = spectrum_of(periodic, (6, 6)).values
    for layer, size in ((padded, (6, 6)), (other, (3, 3))):
        found = spectrum_of(layer, size, circular=True)
        assert found.how == "frequencies"
        assert found.values.numpy() == pytest.approx(values.numpy(), abs=100 * EPS)
    odd = spectrum_of(padded, (5, 6), circular=True)
    assert odd.largest is None
    assert "(5, 6) is not made of whole strides (2, 2)" in odd.reason


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("exact_to", [0, 256])
def test_scales_are_carried_through(scale: float, exact_to: int) -> None:
    layer, size, known = made(PADDED, "zeros")
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.zero_()
    assert spectrum_of(layer, size, exact_to=exact_to).largest / scale == pytest.approx(known[0].item(), rel=5e-5)
    assert spectrum_of(layer, size, circular=True).smallest > 0


def test_zero_missing_and_broken_weights() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    nn.init.zeros_(layer.weight)
    found = spectrum_of(layer, (20, 20), exact_to=0)
    assert (found.largest, found.smallest, found.kernel) == (0.0, 0.0, 0.0)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = math.inf
    assert spectrum_of(layer, (4, 4)).reason == "the weight is not finite"
    model = nn.ModuleList([nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)])
    missing = operator_spectrum(model, lambda: model[0](torch.zeros(1, 1, 2)), unconstrained=True)["1.weight"]
    assert (missing.largest, missing.how) == (None, None)
    assert "was not called" in missing.reason


def test_blocks_of_many_frequencies_are_decomposed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, size, known = made(EXACT, "2d, stride")
    monkeypatch.setattr(operators, "ENTRIES", 100)
    assert spectrum_of(layer, size).values.numpy() == pytest.approx(known.numpy(), abs=100 * EPS * known[0].item())
