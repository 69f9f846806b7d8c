import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    ConfigError,
    LayerGradients,
    LowRank,
    LowRankGradients,
    ShapeError,
    adapted_linear_forward,
    fused_adapters,
)
from loracle.reference.linear_shapes import adapter_suffix, check_adapter, check_linear_shapes, rows_of


def test_fused_adapters_by_hand():
    """Three slices of 1, 2 and 3 outputs; the first and the last have an adapter of rank 2."""
    A = np.arange(4 * 3).reshape(4, 3)
    B = np.arange(4 * 2).reshape(4, 2)
    first, last = fused_adapters(A, B, 0.5, (1, 2, 3), (True, False, True))
    assert first.A.tolist() == A[:2].tolist()
    assert first.B.tolist() == B[:1].tolist()
    assert first.rows == slice(0, 1)
    assert last.A.tolist() == A[2:].tolist()
    assert last.B.tolist() == B[1:].tolist()
    assert last.rows == slice(3, 6)
    for own in (first, last):
        assert own.scaling == 0.5
        assert own.bias is None
        assert own.dropout is None


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=5), st.integers(1, 3), st.integers(1, 4)
)
def test_each_enabled_slice_is_an_adapter_of_its_own(slices, r, n_in):
    """y is that of separate projections, one after the other."""
    widths, enabled = [w for w, _ in slices], [on for _, on in slices]
    rng = np.random.default_rng(0)

    def integers(*shape):
        return rng.integers(-3, 4, shape).astype(float)

    A = integers(r * sum(enabled), n_in)
    B = integers(sum(w for w, on in slices if on), r)
    x, W0 = integers(5, n_in), integers(sum(widths), n_in)
    adapters = fused_adapters(A, B, 2.0, widths, enabled)
    assert isinstance(adapters, tuple)
    assert len(adapters) == sum(enabled)
    y = adapted_linear_forward(x, W0, adapters)
    start = row = number = 0
    for width, on in slices:
        expected = x @ W0[start : start + width].T
        if on:
            own = A[number * r : (number + 1) * r]
            expected = expected + 2.0 * (x @ own.T) @ B[row : row + width].T
            row, number = row + width, number + 1
        assert y[:, start : start + width].tolist() == expected.tolist()
        start += width


def test_flags_may_be_anything_that_is_true_or_false():
    adapters = fused_adapters(np.ones((2, 3)), np.ones((4, 2)), 1.0, [2, 4], [0, 1])
    assert [own.rows for own in adapters] == [slice(2, 6)]
    adapters = fused_adapters(np.ones((2, 3)), np.ones((4, 2)), 1.0, [2, 4], np.array([False, True]))
    assert [own.rows for own in adapters] == [slice(2, 6)]


def test_no_slice_enabled_gives_no_adapter():
    assert fused_adapters(np.ones((0, 3)), np.ones((0, 2)), 1.0, (2, 2), (False, False)) == ()


A, B, WIDTHS, ENABLED = np.ones((4, 3)), np.ones((5, 2)), (2, 4, 3), (True, False, True)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"enabled": (True, False)},
            ConfigError,
            "enabled: expected a flag for each of the 3 slices, got 2; give all",
        ),
        (
            {"enabled": (True, False, True, True)},
            ConfigError,
            "enabled: expected a flag for each of the 3 slices, got 4; give all",
        ),
        (
            {"B": np.ones((4, 2))},
            ShapeError,
            "B: expected (5, r) for the enabled slices, got (4, 2); is it transposed?",
        ),
        (
            {"B": np.ones(5)},
            ShapeError,
            "B: expected (5, r) for the enabled slices, got (5,); is it transposed?",
        ),
        (
            {"A": np.ones((2, 3))},
            ShapeError,
            "A: expected (4, in) for 2 slices with r = 2, got (2, 3); check enabled",
        ),
        (
            {"A": np.ones(4)},
            ShapeError,
            "A: expected (4, in) for 2 slices with r = 2, got (4,); check enabled",
        ),
        (
            {"enabled": (True, True, True)},
            ShapeError,
            "B: expected (9, r) for the enabled slices, got (5, 2); is it transposed?",
        ),
    ],
)
def test_what_does_not_fit_a_fused_projection_is_named(changed, kind, message):
    arguments = {"A": A, "B": B, "scaling": 1.0, "widths": WIDTHS, "enabled": ENABLED} | changed
    with pytest.raises(kind) as caught:
        fused_adapters(**arguments)
    assert str(caught.value) == message


def test_adapters_and_gradients_cannot_be_changed():
    adapter = LowRank(A, B, 1.0)
    for value, field in (
        (adapter, "scaling"),
        (LowRankGradients(A, B, None), "dA"),
        (LayerGradients(A, B, ()), "dx"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)
    assert (adapter.bias, adapter.dropout, adapter.rows) == (None, None, None)


def own(rows=None, **changes):
    return replace(LowRank(np.ones((2, 4)), np.ones((3, 2)), 1.0, rows=rows), **changes)


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (None, 3),
        (slice(0, 3), 3),
        (slice(1, 3), 2),
        (slice(2, 2), 0),
        (slice(3, 3), 0),
        (slice(0, 1, 1), 1),
        (slice(0, 2, None), 2),
    ],
)
def test_how_many_outputs_an_adapter_updates(rows, count):
    assert rows_of(own(rows), 3) == count


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 4),
        slice(-1, 2),
        slice(2, 1),
        slice(0, 3, 2),
        slice(0, 2, -1),
        slice(None, 3),
        slice(0, None),
        slice(0.0, 3),
        slice(0, 3.0),
    ],
    ids=str,
)
def test_rows_that_are_no_range_are_refused(rows):
    for suffix in ("", " of adapter 1"):
        with pytest.raises(ConfigError) as caught:
            rows_of(own(rows), 3, suffix)
        assert str(caught.value) == (
            f"rows{suffix}: expected a slice of step 1 within 3 outputs, got {rows}; name its start and stop"
        )


def test_an_adapter_is_named_only_where_there_are_several():
    one, two = [own()], [own(), own()]
    assert adapter_suffix(0, one) == ""
    assert [adapter_suffix(number, two) for number in (0, 1)] == [" of adapter 0", " of adapter 1"]


X, W0 = np.ones((2, 5, 4)), np.ones((6, 4))


def refused(message, adapters=(), *, kind=ShapeError, x=X, weight=W0, **more):
    with pytest.raises(kind, match="^" + re.escape(message) + "$"):
        check_linear_shapes(x, weight, adapters, **more)


def test_shapes_that_fit():
    adapters = [own(slice(0, 3), bias=np.ones(3)), own(slice(2, 5), dropout=np.ones(X.shape))]
    check_linear_shapes(X, W0, adapters, bias=np.ones(6), dy=np.ones((2, 5, 6)))
    check_linear_shapes(X[0, 0], W0, [], dy=np.ones(6))
    check_adapter(own(slice(1, 4)), (6, 4), X.shape, "")


def test_a_wrong_shape_is_named_in_full():
    fit = "to fit W0 (6, 4)"
    refused("W0: expected (out, in), got (4,); pass the weight as a matrix", weight=W0[0])
    refused("W0: expected (out, in), got (1, 6, 4); pass the weight as a matrix", weight=W0[None])
    refused(f"x: expected (..., 4) {fit}, got (2, 3); check its last axis", x=np.ones((2, 3)))
    refused(f"x: expected (..., 4) {fit}, got (); check its last axis", x=np.ones(()))
    good = own(slice(0, 3))
    for shape in ((4, 2), (4,), (0, 4), (2, 4, 1)):
        message = f"expected (r, 4) {fit}, got {shape}; is it transposed?"
        refused(f"A: {message}", [replace(good, A=np.ones(shape))])
        refused(f"A of adapter 1: {message}", [good, replace(good, A=np.ones(shape))])
    fit_a = f"{fit} and A (2, 4)"
    refused(f"B: expected (6, 2) {fit_a}, got (3, 2); check its axes", [own()])
    refused(f"B of adapter 0: expected (6, 2) {fit_a}, got (3, 2); check its axes", [own(), good])
    refused(f"B: expected (3, 2) {fit_a}, got (2, 3); check its axes", [replace(good, B=np.ones((2, 3)))])
    message = f"expected (3,) {fit_a}, got (6,); check its axes"
    refused(f"bias of lora_B: {message}", [replace(good, bias=np.ones(6))])
    refused(f"bias of lora_B of adapter 1: {message}", [good, replace(good, bias=np.ones(6))])
    message = f"expected (2, 5, 4) {fit_a}, got (5, 4); check its axes"
    refused(f"dropout: {message}", [replace(good, dropout=np.ones((5, 4)))])
    refused(f"dropout of adapter 1: {message}", [good, replace(good, dropout=np.ones((5, 4)))])
    fit_x = f"{fit} and x (2, 5, 4)"
    refused(f"bias: expected (6,) {fit_x}, got (4,); check its axes", bias=np.ones(4))
    refused(f"dy: expected (2, 5, 6) {fit_x}, got (5, 6); check its axes", dy=np.ones((5, 6)))
    message = "expected a slice of step 1 within 6 outputs, got slice(0, 7, None); name its start and stop"
    refused(f"rows: {message}", [own(slice(0, 7))], kind=ConfigError)
    refused(f"rows of adapter 1: {message}", [good, own(slice(0, 7))], kind=ConfigError)


def test_the_checks_of_one_adapter_are_those_of_a_layer():
    with pytest.raises(ShapeError) as caught:
        check_adapter(own(), (6, 4), X.shape, " of the key")
    assert str(caught.value) == (
        "B of the key: expected (6, 2) to fit W0 (6, 4) and A (2, 4), got (3, 2); check its axes"
    )
