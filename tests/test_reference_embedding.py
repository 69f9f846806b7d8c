import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from exact_linear import error, rational
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import (
    DTYPES,
    EmbeddingProblem,
    assert_difference_quotients,
    assert_exact_tier,
    assert_within_bounds,
    breaks_forward,
    broken_gradients,
    embedding_problems,
)

from loracle.reference import (
    ConfigError,
    DTypeError,
    LowRank,
    Precision,
    ShapeError,
    adapted_linear_backward,
    adapted_linear_forward,
    embedding_backward,
    embedding_backward_bound,
    embedding_forward,
    embedding_forward_bound,
)
from loracle.reference.precision import gamma

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
EXAMPLES = settings(max_examples=30)


def by_hand(dtype, **options):
    """V = 3, d = 2, r = 1; y and the gradients below were worked out on paper."""
    return EmbeddingProblem(
        dy=np.array([[1, 0], [0, 1], [1, 1], [2, -1]], dtype),
        W0=np.array([[1, 0], [0, 1], [2, 2]], dtype),
        adapters=(LowRank(np.array([[1, 2, -1]], dtype), np.array([[1], [3]], dtype), 2.0),),
        ids=np.array([2, 0, 2, 1]),
        **options,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(object)], ids=str)
def test_an_embedding_worked_out_by_hand(dtype):
    plain, scaled = by_hand(dtype), by_hand(dtype, embed_scale=0.5)
    assert plain.forward().tolist() == [[0, -4], [3, 6], [0, -4], [4, 13]]
    assert scaled.forward().tolist() == [[0, -2], [1.5, 3], [0, -2], [2, 6.5]]
    gradients = plain.backward()
    assert gradients[0, "A"].tolist() == [[6, -2, 10]]
    assert gradients[0, "B"].tolist() == [[4], [-4]]
    assert [g.tolist() for g in scaled.backward().values()] == [[[3, -1, 5]], [[2], [-2]]]
    padded = by_hand(dtype, padding_idx=2)
    assert padded.forward().tolist() == plain.forward().tolist()
    assert [g.tolist() for g in padded.backward().values()] == [[[6, -2, 0]], [[4], [-4]]]
    first = by_hand(dtype, padding_idx=0).backward()
    assert first[0, "A"].tolist() == [[0, -2, 10]]
    for array in (plain.forward(), scaled.forward(), *gradients.values()):
        assert array.dtype == dtype


def test_the_gradients_are_one_pair_for_each_adapter():
    p = by_hand(F64)
    A, B, own = p.adapters[0].A, p.adapters[0].B, p.adapters[0]
    first, second = embedding_backward(p.dy, p.ids, p.W0, [own, LowRank(A, B, -1.0)])
    assert first.dA.tolist() == [[6, -2, 10]]
    assert second.dA.tolist() == [[-3, 1, -5]]
    assert second.dB.tolist() == [[-2], [2]]
    assert first.dbias is None
    assert embedding_backward(p.dy, p.ids, p.W0, []) == ()
    assert embedding_forward(p.ids, p.W0, []).tolist() == p.W0[p.ids].tolist()


@EXAMPLES
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: embedding_problems(dtype, exact=True)))
def test_the_exact_tier_agrees_bit_for_bit_in_every_dtype(problem):
    assert_exact_tier(problem)


@EXAMPLES
@given(embedding_problems(F32, exact=True))
def test_gradients_are_the_exact_difference_quotients(problem):
    """But for the column of padding_idx, which is held at zero."""

    def held(key, index):
        return key[1] == "A" and index[1] == problem.padding_idx

    assert_difference_quotients(problem.rational(), skip=held)
    for key, gradient in problem.backward().items():
        if key[1] == "A" and problem.padding_idx is not None:
            assert not gradient[:, problem.padding_idx].any()


@EXAMPLES
@given(embedding_problems(F64, exact=True))
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(problem):
    """Its weight is stored (in, out), and the exact update of it is ``scaling * (B A)^T``."""
    p = replace(problem.rational(), padding_idx=None)
    scale = 1 if p.embed_scale is None else rational(p.embed_scale)
    one_hot = (p.ids[..., None] == np.arange(len(p.W0))).astype(int).astype(object)
    y = adapted_linear_forward(one_hot, p.W0, p.adapters, fan_in_fan_out=True)
    assert p.forward().tolist() == (y * scale).tolist()
    linear = adapted_linear_backward(p.dy * scale, one_hot, p.W0, p.adapters, fan_in_fan_out=True)
    for number, own in enumerate(linear.adapters):
        assert p.backward()[number, "A"].tolist() == own.dA.tolist()
        assert p.backward()[number, "B"].tolist() == own.dB.tolist()
    weight = p.W0
    for own in p.adapters:
        weight = weight + (own.B @ own.A).T * rational(own.scaling)
    assert p.forward().tolist() == (weight[p.ids] * scale).tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64], ids=str)
def test_ids_of_any_integer_width_and_any_leading_axes(dtype):
    p = by_hand(F64)
    for shape in ((), (1,), (2, 2), (2, 1, 2), (0,), (3, 0)):
        ids = np.resize(p.ids, shape).astype(dtype)
        y = embedding_forward(ids, p.W0, p.adapters)
        assert y.shape == (*shape, 2)
        for index in np.ndindex(shape):
            assert y[index].tolist() == embedding_forward(ids[index], p.W0, p.adapters).tolist()
        gradients = embedding_backward(np.ones_like(y), ids, p.W0, p.adapters)[0]
        counts = np.bincount(ids.ravel().astype(int), minlength=3)
        assert gradients.dA.tolist() == [[8 * count for count in counts]]
        assert gradients.dB.shape == (2, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    assert_within_bounds(data.draw(embedding_problems(dtype)))


def long_problem(dtype, **changes):
    rng = np.random.default_rng(5)
    adapters = tuple(LowRank(rng.normal(size=(8, 6)), rng.normal(size=(5, 8)), s) for s in (1 / 3, 2.0))
    problem = EmbeddingProblem(
        dy=rng.normal(size=(40, 5)),
        W0=rng.normal(size=(6, 5)),
        adapters=adapters,
        ids=rng.integers(0, 5, 40),
        embed_scale=7.3,
        padding_idx=2,
    )
    return replace(problem.astype(dtype), **changes)


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bounds(wrong, right):
    problem = long_problem(wrong)
    assert breaks_forward(problem, problem, right)
    assert broken_gradients(problem, problem, right) == {(i, name) for i in (0, 1) for name in "AB"}


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_wrong_formula_breaks_the_bounds(dtype):
    right = long_problem(dtype)
    both = {(i, name) for i in (0, 1) for name in "AB"}
    for wrong in (replace(right, embed_scale=None), replace(right, embed_scale=7.301)):
        assert breaks_forward(wrong, right, dtype)
        assert broken_gradients(wrong, right, dtype) == both
    assert breaks_forward(replace(right, adapters=right.adapters[:1]), right, dtype)
    assert breaks_forward(right.with_adapter(1, scaling=2.001), right, dtype)
    assert broken_gradients(right.with_adapter(1, scaling=2.001), right, dtype) == {(1, "A"), (1, "B")}
    assert broken_gradients(replace(right, padding_idx=None), right, dtype) == {(0, "A"), (1, "A")}
    shifted = replace(right, ids=right.ids + 1, padding_idx=3)
    assert breaks_forward(shifted, right, dtype)
    assert broken_gradients(shifted, right, dtype) == both


def growth(n, c, precision):
    a, b = gamma(n, precision.wide.unit_roundoff), gamma(c, precision.form.unit_roundoff)
    return a + b + a * b


# Roundings that are stored, of y, dA and dB with embed_scale and without, counted by hand: a scaling that
# need not be a number of the dtype, a product with a wide accumulator, an elementwise product, a sum; the
# slack is 4.
STORED = {
    (F32, None): ((9, 8, 8), (7, 6, 6)),
    (F64, None): ((7, 6, 6), (6, 5, 5)),
    (BF16, F32): ((10, 10, 9), (8, 8, 7)),
}


@pytest.mark.parametrize(("dtype", "wide"), STORED, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_bounds_count_the_roundings_that_they_say(dtype, wide, scaled):
    """With every tensor of ones the sizes are counted by hand; nothing underflows."""
    V, d, r, N, most = 4, 3, 2, 9, 5
    ids = np.array([3, 1, 3, 3, 0, 3, 1, 1, 3])
    W0, dy = np.ones((V, d), dtype), np.ones((N, d), dtype)
    adapters = [LowRank(np.ones((r, V), dtype), np.ones((d, r), dtype), 2.0)]
    precision, scale = Precision(dtype, accumulator=wide), 4.0 if scaled else 1.0
    options = {"embed_scale": scale} if scaled else {}

    def counted(bound, terms, size):
        sizes = [growth(terms, count, precision) * size for count in range(40)]
        return next(n for n in range(39) if sizes[n] <= bound <= sizes[n + 1])

    forward = embedding_forward_bound(ids, W0, adapters, precision, **options)
    own = embedding_backward_bound(dy, ids, W0, adapters, precision, **options)[0]
    padded = embedding_backward_bound(dy, ids, W0, adapters, precision, padding_idx=3, **options)[0]
    counts = (
        counted(forward.max(), r, scale * (1 + 2 * r)),
        counted(own.dA[0, 3], d + most, scale * 2 * most * d),
        counted(own.dB.max(), N, scale * 2 * N),
    )
    assert counts == STORED[dtype, wide][0 if scaled else 1]
    assert counted(padded.dA[0, 1], d + 3, scale * 2 * 3 * d) == counts[1]
    # No position, or only padding: nothing but underflow.
    assert 0 <= own.dA[0, 2] < 1e-30
    assert 0 <= padded.dA[0, 3] < 1e-30
    assert own.dbias is None


@pytest.mark.parametrize("where", ["scaling", "embed_scale", "both"])
def test_underflows_before_or_after_either_factor_are_within_the_bound(where):
    """In float16, B dy underflows to zero; computed with the factors at the end, all is lost."""
    s, e = {"scaling": (2.0**9, 1.0), "embed_scale": (1.0, 2.0**9), "both": (2.0**5, 2.0**5)}[where]
    dy, ids = np.full((1, 16), 2.0**-13, F16), np.array([0])
    A, B = np.ones((1, 1), F16), np.full((16, 1), 2.0**-12, F16)
    lost = 16 * s * e * 2.0**-25
    own = embedding_backward_bound(dy, ids, np.ones((1, 16), F16), [LowRank(A, B, s)], F16, embed_scale=e)[0]
    assert (own.dA >= lost).all()
    forward = embedding_forward_bound(
        ids, np.zeros((1, 1), F16), [LowRank(dy.T, dy * F16.type(2), s)], F16, embed_scale=e
    )
    assert (forward >= lost).all()


def test_small_factors_applied_early_are_within_the_bound():
    """In float16, embed_scale * scaling * B underflows to zero, and A is large."""
    adapter = LowRank(np.full((1, 1), 2.0**12, F16), np.full((1, 1), 2.0**-5, F16), 2.0**-10)
    bound = embedding_forward_bound(
        np.array([0]), np.zeros((1, 1), F16), [adapter], F16, embed_scale=2.0**-10
    )
    assert bound[0, 0] >= 2.0**-13


@pytest.mark.parametrize(
    ("scaling", "embed_scale", "weight"),
    [(1.0, None, 1), (-0.25, 8.0, 8), (0.25, 0.5, 8), (16.0, 0.125, 16), (4.0, 8.0, 32), (0.5, None, 2)],
)
def test_an_underflow_weighs_as_much_as_the_factors_can_make_it(scaling, embed_scale, weight):
    """Of zeros nothing but underflows, each of 2^-24 (1 + weight), which the later operations multiply."""
    ids, nothing = np.zeros(1, int), np.zeros((1, 1), F16)
    own = [LowRank(nothing, nothing, scaling)]
    one, outer = 2.0**-24 * (1 + weight), 1.0 if embed_scale is None else embed_scale
    size = abs(scaling)
    last = 0 if embed_scale is None else one
    forward = (3 + 2 * size) * outer * one + last
    dA = (2 * size * outer + outer) * one + last + one
    dB = (2 * size + 1) * outer * one + last
    found = embedding_backward_bound(nothing, ids, nothing, own, F16, embed_scale=embed_scale)[0]
    bounds = embedding_forward_bound(ids, nothing, own, F16, embed_scale=embed_scale), found.dA, found.dB
    for bound, expected in zip(bounds, (forward, dA, dB), strict=True):
        assert bound == pytest.approx(expected, rel=2.0**-5)


ARGUMENTS = {
    "ids": np.array([[0, 4, 2]]),
    "W0": np.ones((5, 3)),
    "A": np.ones((2, 5)),
    "B": np.ones((3, 2)),
    "dy": np.ones((1, 3, 3)),
}


def call(adapters=None, padding_idx=None, **changed):
    """Call all four functions, each on its own; they must raise the same error."""
    a = ARGUMENTS | changed
    own = [LowRank(a["A"], a["B"], 1.0)] if adapters is None else adapters
    given = a["ids"], a["W0"], own
    backward = {"padding_idx": padding_idx}
    calls = {
        "backward": lambda: embedding_backward(a["dy"], *given, **backward),
        "backward bound": lambda: embedding_backward_bound(a["dy"], *given, F32, **backward),
    }
    if "dy" not in changed and padding_idx is None:
        calls |= {
            "forward": lambda: embedding_forward(*given),
            "forward bound": lambda: embedding_forward_bound(*given, F32),
        }
    return calls


def refused(kind, message, calls):
    for name, attempt in calls.items():
        with pytest.raises(kind, match="^" + re.escape(message) + "$"):
            attempt()
        assert name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"W0": np.ones(5)}, "W0: expected (V, d), got (5,); pass the weight as a matrix"),
        (
            {"A": np.ones((5, 2))},
            "A: expected (r, 5) to fit W0 (5, 3), got (5, 2); is it transposed?",
        ),
        ({"A": np.ones(5)}, "A: expected (r, 5) to fit W0 (5, 3), got (5,); is it transposed?"),
        ({"A": np.ones((0, 5))}, "A: expected (r, 5) to fit W0 (5, 3), got (0, 5); is it transposed?"),
        (
            {"B": np.ones((2, 3))},
            "B: expected (3, 2) to fit W0 (5, 3) and A (2, 5), got (2, 3); is it transposed?",
        ),
        (
            {"dy": np.ones((3, 3))},
            "dy: expected (1, 3, 3) to fit W0 (5, 3) and ids (1, 3), got (3, 3); check its axes",
        ),
        (
            {"ids": np.array([[0, 5, 6]])},
            "ids: expected integers from 0 to 4 to fit W0 (5, 3), got 5 at (0, 1); "
            "check where they come from",
        ),
        (
            {"ids": np.array([[0, 1, -1]], np.int8)},
            "ids: expected integers from 0 to 4 to fit W0 (5, 3), got -1 at (0, 2); "
            "check where they come from",
        ),
        (
            {"ids": np.array([[2**64 - 1, 1, 0]], np.uint64)},
            "ids: expected integers from 0 to 4 to fit W0 (5, 3), got 18446744073709551615 at (0, 0); "
            "check where they come from",
        ),
    ],
)
def test_what_does_not_fit_is_named(changed, message):
    refused(ShapeError, message, call(**changed))


@pytest.mark.parametrize("dtype", [np.float64, bool, object], ids=str)
def test_ids_that_are_no_integers_are_refused(dtype):
    ids = ARGUMENTS["ids"].astype(dtype)
    refused(DTypeError, f"ids: expected integers, got {ids.dtype}; convert it", call(ids=ids))


def test_the_adapter_is_named_among_several():
    a = ARGUMENTS
    good, bad = LowRank(a["A"], a["B"], 1.0), LowRank(a["A"], a["B"][:2], 1.0)
    message = "B of adapter 1: expected (3, 2) to fit W0 (5, 3) and A (2, 5), got (2, 2); is it transposed?"
    refused(ShapeError, message, call(adapters=[good, bad]))
    message = "A of adapter 0: expected (r, 5) to fit W0 (5, 3), got (2, 4); is it transposed?"
    refused(ShapeError, message, call(adapters=[LowRank(a["A"][:, :4], a["B"], 1.0), good]))


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("dropout", np.ones((1, 3, 5)), "dropout"),
        ("bias", np.ones(3), "bias of lora_B"),
        ("rows", slice(0, 3), "rows"),
    ],
)
def test_what_an_embedding_has_not_is_refused_by_name(field, value, name):
    plain = LowRank(ARGUMENTS["A"], ARGUMENTS["B"], 1.0)
    own = replace(plain, **{field: value})
    message = "expected None, an embedding has none; leave it out"
    refused(ConfigError, f"{name}: {message}", call(adapters=[own]))
    refused(ConfigError, f"{name} of adapter 1: {message}", call(adapters=[plain, own]))


@pytest.mark.parametrize("padding_idx", [-1, 5])
def test_a_padding_idx_out_of_range_is_refused(padding_idx):
    message = (
        f"padding_idx: expected None or an id from 0 to 4, got {padding_idx}; "
        "count a negative one from the end of the vocabulary"
    )
    refused(ConfigError, message, call(padding_idx=padding_idx))
    assert call(padding_idx=4)["backward"]()[0].dA[:, 4].tolist() == [0, 0]
    assert call(padding_idx=0)["backward"]()[0].dA[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["A", "B", "dy"])
def test_mixed_dtypes_are_refused(name):
    message = f"{name}: expected float64 as W0 has, got float32; convert it"
    calls = call(**{name: ARGUMENTS[name].astype(np.float32)})
    refused(DTypeError, message, {key: calls[key] for key in calls if "bound" not in key})


def test_the_exact_values_may_have_other_dtypes_than_the_precision():
    problem = long_problem(F64)
    narrow = problem.astype(F32)
    assert (error(narrow.forward(), problem.rational().forward()) <= problem.forward_bound(F32)).all()
