"""Layouts against explicit hand indexing: every weight shape is read as the matrices it should be, and written back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiefel.errors import LayoutError
from stiefel.layout import Layout


def numbers(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_rows(w, kind, blocks):
    """The filters of each block, row by row and index by index: a list of (out, fan_in) matrices."""
    if kind == "batched":
        return batch_by_hand(w)
    if kind == "transposed":
        i = w.shape[0] // blocks
        return [torch.stack([w[g * i : (g + 1) * i, o].flatten() for o in range(w.shape[1])]) for g in range(blocks)]
    o = w.shape[0] // blocks
    return [torch.stack([w[g * o + r].flatten() for r in range(o)]) for g in range(blocks)]


def by_hand(w, kind, blocks, group_size):
    matrices = []
    for rows in output_rows(w, kind, blocks):
        if group_size is not None:
            matrices += [rows[k : k + group_size] for k in range(0, len(rows), group_size)]
        else:
            matrices.append(rows.T if rows.shape[0] > rows.shape[1] else rows)
    return torch.stack(matrices)


def batch_by_hand(w):
    if w.ndim == 3:
        return [w[i] for i in range(w.shape[0])]
    return [w[i, j] for i in range(w.shape[0]) for j in range(w.shape[1])]


CASES = {
    "linear wide": ((3, 7), "plain", 1, None),
    "linear tall": ((7, 3), "plain", 1, None),
    "linear square": ((5, 5), "plain", 1, None),
    "linear 1xn": ((1, 6), "plain", 1, None),
    "linear nx1": ((6, 1), "plain", 1, None),
    "linear 1x1": ((1, 1), "plain", 1, None),
    "conv1d": ((4, 3, 5), "plain", 1, None),
    "conv1d tall": ((9, 2, 3), "plain", 1, None),
    "conv2d": ((4, 3, 3, 2), "plain", 1, None),
    "conv3d": ((4, 2, 2, 3, 2), "plain", 1, None),
    "conv2d grouped": ((6, 2, 3, 3), "plain", 3, None),
    "conv2d grouped tall": ((12, 2, 1, 2), "plain", 2, None),
    "conv2d depthwise": ((5, 1, 3, 3), "plain", 5, None),
    "conv2d depthwise multiplier": ((10, 1, 2, 2), "plain", 5, None),
    "transposed conv1d": ((6, 4, 3), "transposed", 1, None),
    "transposed conv2d tall": ((2, 9, 2, 2), "transposed", 1, None),
    "transposed conv2d grouped": ((6, 4, 3, 2), "transposed", 3, None),
    "transposed conv2d grouped tall": ((4, 9, 2, 2), "transposed", 2, None),
    "transposed conv3d grouped": ((4, 3, 2, 1, 2), "transposed", 2, None),
    "transposed depthwise": ((4, 1, 3, 3), "transposed", 4, None),
    "lstm gates": ((20, 5), "plain", 4, None),
    "gru gates tall": ((18, 4), "plain", 3, None),
    "batched": ((3, 2, 5), "batched", 1, None),
    "batched tall": ((3, 5, 2), "batched", 1, None),
    "batched twice": ((2, 3, 2, 4), "batched", 1, None),
    "group size, tall": ((12, 5), "plain", 1, 4),
    "group size, wide": ((6, 8), "plain", 1, 3),
    "group size one": ((6, 3), "plain", 1, 1),
    "group size in conv groups": ((12, 2, 2, 2), "plain", 2, 3),
    "group size transposed": ((4, 6, 2, 2), "transposed", 2, 3),
    "group size batched": ((3, 6, 4), "batched", 1, 2),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request):
    shape, kind, blocks, group_size = CASES[request.param]
    layout = Layout(
        shape, blocks=blocks, transposed=kind == "transposed", batched=kind == "batched", group_size=group_size
    )
    return layout, kind, blocks, group_size


def test_matrices_are_those_read_by_hand(case):
    layout, kind, blocks, group_size = case
    w = numbers(layout.shape)
    matrices = layout.matrices(w)
    assert torch.equal(matrices, by_hand(w, kind, blocks, group_size))
    assert tuple(matrices.shape) == layout.matrix_shape


def test_round_trip_is_exact(case):
    layout = case[0]
    w = numbers(layout.shape)
    assert torch.equal(layout.tensor(layout.matrices(w)), w)
    m = numbers(layout.matrix_shape, seed=1)
    assert torch.equal(layout.matrices(layout.tensor(m)), m)


def test_matrices_are_never_taller_than_wide(case):
    _, p, n = case[0].matrix_shape
    assert 1 <= p <= n


@pytest.mark.parametrize("scale", [0.5, 1.0, math.sqrt(2), 3.0])
def test_scale_divides_points_and_multiplies_weights(case, scale):
    plain = case[0]
    layout = Layout(plain.shape, plain.blocks, plain.transposed, plain.batched, plain.group_size, scale)
    w = numbers(layout.shape)
    assert torch.allclose(layout.points(w), plain.matrices(w) / scale, rtol=1e-15, atol=0)
    assert torch.allclose(layout.weight(layout.points(w)), w, rtol=1e-15, atol=0)
    assert torch.equal(layout.matrices(w), plain.matrices(w))  # gradients are not scaled


def test_layout_works_on_non_contiguous_weights():
    w = numbers((3, 4, 2, 6)).permute(3, 1, 0, 2)
    layout = Layout(tuple(w.shape))
    assert not w.is_contiguous()
    assert torch.equal(layout.matrices(w), w.contiguous().reshape(6, 24)[None])
    assert torch.equal(layout.tensor(layout.matrices(w)), w)


def test_gradients_flow_through_the_layout(case):
    layout = case[0]
    w = numbers(layout.shape).requires_grad_()
    c = numbers(layout.matrix_shape, seed=2)
    (layout.matrices(w) * c).sum().backward()
    assert torch.equal(w.grad, layout.tensor(c))


@given(
    blocks=st.integers(1, 3),
    out=st.integers(1, 6),
    inputs=st.integers(1, 4),
    kernel=st.lists(st.integers(1, 3), min_size=0, max_size=3),
    kind=st.sampled_from(["plain", "transposed"]),
    grouped=st.booleans(),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_shapes(blocks, out, inputs, kernel, kind, grouped, data):
    shape = (blocks * inputs, out, *kernel) if kind == "transposed" else (blocks * out, inputs, *kernel)
    fan_in = inputs * math.prod(kernel)
    sizes = [d for d in range(1, min(out, fan_in) + 1) if out % d == 0]
    group_size = data.draw(st.sampled_from(sizes)) if grouped else None
    layout = Layout(shape, blocks=blocks, transposed=kind == "transposed", group_size=group_size, scale=2.0)
    w = numbers(shape)
    assert torch.equal(layout.matrices(w), by_hand(w, kind, blocks, group_size))
    assert torch.equal(layout.tensor(layout.matrices(w)), w)
    assert torch.equal(layout.weight(layout.points(w)), w)  # a power of two scales without rounding
    _, p, n = layout.matrix_shape
    assert p <= n


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (12, 5), "group_size": 5}, r"group_size=5 .* 12 outputs .*\[1, 2, 3, 4\]"),
        ({"shape": (12, 5), "group_size": 6}, r"group_size=6 exceeds the fan-in 5"),
        ({"shape": (12, 5), "group_size": 24}, r"group_size=24"),
        ({"shape": (12, 5), "group_size": 0}, r"group_size=0"),
        ({"shape": (12, 2, 2), "blocks": 4, "group_size": 2}, r"group_size=2 .* 3 outputs"),
        ({"shape": (10, 5), "blocks": 4}, r"10 outputs do not split into 4"),
        # A transposed kernel splits along its inputs, which come first.
        ({"shape": (5, 2, 3), "blocks": 2, "transposed": True}, r"5 .*2"),
    ],
    ids=["divisor", "fan-in", "larger", "zero", "within-block", "blocks", "transposed-blocks"],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**arguments)


def test_text_names_the_orthonormal_side():
    assert str(Layout((3, 7))) == "3×7 rows"
    assert str(Layout((7, 3))) == "7×3 columns"
    assert str(Layout((12, 2, 2, 2), blocks=2)) == "2 × (6×8 rows)"
