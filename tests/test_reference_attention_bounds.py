import math
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from exact_attention import (
    NAMES,
    Block,
    everything,
    exact_values,
    flat,
    forward,
    gaussian_block,
)
from exact_linear import error
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import (
    Attention,
    ConfigError,
    DTypeError,
    LowRank,
    Precision,
    Projection,
    Projections,
    ShapeError,
    adapted_linear_forward_bound,
    attention_backward_bound,
    attention_forward_bound,
    attention_scores,
    gamma,
    rotary_tables,
    softmax,
)
from loracle.reference.balls import Ball
from loracle.reference.formats import FORMATS
from loracle.reference.precision import ROUND_UP
from loracle.reference.softmax_bounds import softmax_ball

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32, F64 = (np.dtype(name) for name in ("f2", "f4", "f8"))
DTYPES = [form.dtype for form in FORMATS]
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
U32 = 2.0**-24


def bounds_of(block, precision, **options):
    arguments = (block.projections, block.attention, precision)
    options = {"rotary": block.rotary, "mask": block.mask} | options
    y = attention_forward_bound(block.x, *arguments, **options)
    return {"y": y, **flat(attention_backward_bound(block.dy, block.x, *arguments, **options))}


def outside(computed, block, dtype, exact=None):
    """Which of y and the gradients are outside the bound around the exact values.

    Those are float64's where none are given, and float64's own bound is added.
    """
    bounds = bounds_of(block, dtype)
    if exact is not None:
        return [name for name in computed if not (error(computed[name], exact[name]) <= bounds[name]).all()]
    wide, own = everything(block.astype(F64)), bounds_of(block, F64)
    return [
        name
        for name in computed
        if not (np.abs(computed[name].astype(F64) - wide[name]) <= bounds[name] + own[name]).all()
    ]


@BY_DTYPE
@settings(max_examples=8)
@given(data=st.data())
def test_forward_and_backward_stay_within_the_bounds(dtype, data):
    block = gaussian_block(
        data.draw(st.integers(0, 2**32 - 1)),
        n=1,
        length=data.draw(st.integers(1, 4)),
        d=data.draw(st.integers(1, 5)),
        heads=data.draw(st.sampled_from([(1, 1, 4), (2, 1, 2), (2, 2, 2)])),
        r=data.draw(st.sampled_from([1, 3])),
        adapters=data.draw(st.sampled_from([0, 1, 2])),
        rotary=data.draw(st.booleans()),
        masked=data.draw(st.booleans()),
        causal=data.draw(st.booleans()),
        size=data.draw(st.sampled_from([0.1, 1.0, 3.0])),
        dtype=dtype,
    )
    assert not outside(everything(block), block, dtype, exact_values(block))


LARGE = {"length": 12, "d": 24, "heads": (4, 2, 8)}


def test_the_bounds_hold_and_are_about_a_thousandth_of_the_values():
    """Worst cases multiply from projection to projection; typical errors are a 5000th of the bound of y."""
    block = gaussian_block(0, **LARGE, dtype=F32)
    wide = everything(block.astype(F64))
    bounds = bounds_of(block, F32)
    computed = everything(block)
    ratios = {name: float(np.median(np.abs(computed[name] - wide[name]) / bounds[name])) for name in bounds}
    print({name: f"{ratio:.1e}" for name, ratio in ratios.items()})
    assert not outside(computed, block, F32)
    assert 1e-4 < ratios["y"] < 1
    assert all(ratio > 1e-5 for ratio in ratios.values())
    assert np.median(bounds["y"] / np.abs(wide["y"])) < 2e-3


@pytest.mark.parametrize(("wrong", "right"), [(BF16, F32), (F16, F32), (F32, F64)], ids=str)
def test_an_evaluation_in_a_narrower_dtype_breaks_the_bounds(wrong, right):
    block = gaussian_block(1, **LARGE, dtype=wrong)
    broken = outside(everything(block), block, right)
    assert {"y", "v.dbias", "v.dA", "v.dB", "o.dbias", "o.dA", "o.dB"} <= set(broken)


def without_adapter(name):
    return lambda block: block.with_projection(name, adapters=())


def without_dropout(name):
    def change(block):
        own = getattr(block.projections, name).adapters[0]
        return block.with_projection(name, adapters=(replace(own, dropout=None),))

    return change


def with_attention(**changes):
    return lambda block: block._replace(attention=replace(block.attention, **changes))


def regrouped(block):
    """The query heads are dealt out to the key-value heads in turn, not one after the other."""
    own, D = block.projections, block.attention.head_dim
    rows = np.concatenate([np.arange(h * D, (h + 1) * D) for h in (0, 2, 1, 3)])
    adapter = own.q.adapters[0]
    q = Projection(own.q.W0[rows], (replace(adapter, B=adapter.B[rows]),), own.q.bias[rows])
    adapter = own.o.adapters[0]
    dropped = replace(adapter, A=adapter.A[:, rows], dropout=adapter.dropout[..., rows])
    o = Projection(own.o.W0[:, rows], (dropped,), own.o.bias)
    return block._replace(projections=replace(own, q=q, o=o))


WRONG = {
    **{f"no adapter on {name}": without_adapter(name) for name in NAMES},
    **{f"no dropout on {name}": without_dropout(name) for name in NAMES},
    "scale 1": with_attention(scale=1.0),
    "scale off by one per cent": with_attention(scale=8**-0.5 * 1.01),
    "not causal": with_attention(causal=False),
    "a token too far": lambda block: block._replace(
        attention=replace(block.attention, causal=False), mask=np.tri(12, k=1, dtype=bool)
    ),
    "a token too few": lambda block: block._replace(
        # The diagonal stays in the first row, else that would be empty.
        mask=np.tri(12, k=-1, dtype=bool) | (np.add.outer(np.arange(12), np.arange(12)) == 0)
    ),
    "heads grouped otherwise": regrouped,
    "sin with the other sign": lambda block: block._replace(rotary=(block.rotary[0], -block.rotary[1])),
    "no rotary embedding": lambda block: block._replace(rotary=None),
    "positions off by one for half of the tokens": lambda block: block._replace(
        rotary=tuple(table.astype(F32) for table in rotary_tables(np.arange(12) + (np.arange(12) > 5), 8))
    ),
    "no bias on v": lambda block: block.with_projection("v", bias=None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_breaks_the_bounds(name):
    block = gaussian_block(2, **LARGE)
    computed = everything(block)
    assert not outside(computed, block, F32)
    wrong = everything(WRONG[name](block))
    assert "y" in outside({key: wrong[key] for key in wrong if key in computed}, block, F32)


@pytest.mark.parametrize("name", NAMES)
def test_one_projection_in_bfloat16_breaks_the_bounds(name):
    """The weight is rounded to bfloat16, as one layer in the wrong dtype would have it."""
    block = gaussian_block(3, **LARGE)
    W0 = getattr(block.projections, name).W0.astype(BF16).astype(F32)
    assert "y" in outside(everything(block.with_projection(name, W0=W0)), block, F32)


def roots(block):
    """The root of the scale applied to query and key, in float32: torch's fallback does so."""
    own, root = block.projections, np.float32(math.sqrt(block.attention.score_scale))
    changed = {}
    for name in ("q", "k"):
        each = getattr(own, name)
        adapter = each.adapters[0]
        changed[name] = Projection(each.W0 * root, (replace(adapter, B=adapter.B * root),), each.bias * root)
    attention = replace(block.attention, scale=1.0)
    return block._replace(attention=attention, projections=replace(own, **changed))


def merged_updates(block):
    """scaling * B A computed first: x (B A)^T in the place of (x A^T) B^T; without dropout."""
    for name in NAMES:
        own = getattr(block.projections, name)
        adapter = own.adapters[0]
        delta = np.float32(adapter.scaling) * (adapter.B @ adapter.A)
        identity = np.eye(delta.shape[1], dtype=F32)
        block = block.with_projection(name, adapters=(LowRank(identity, delta, 1.0),))
    return block


def test_other_orders_of_the_factors_stay_within_the_bounds():
    for seed in range(3):
        block = gaussian_block(seed, **LARGE, keep=1.0)
        for change in (roots, merged_updates):
            other = everything(change(block))
            if change is merged_updates:
                kept = ("y", "dx", *(f"{name}.dbias" for name in NAMES))
            else:
                kept = ("y", "dx", "v.dbias", "o.dbias", "v.dA", "o.dB", "v.dB", "o.dA")
            assert not outside({name: other[name] for name in kept}, block, F32)


def in_blocks(query, key, value, scale, size, exp):
    """Causal attention of one head with rescaling, in the dtype: context and log sum exp."""
    length = len(query)
    highest = np.full((length, 1), -np.inf, query.dtype)
    total, context = np.zeros_like(highest), np.zeros_like(query)
    for start in range(0, length, size):
        stop = min(start + size, length)
        scores = query @ key[start:stop].T * scale
        causal = np.arange(length)[:, None] >= np.arange(start, stop)
        scores = np.where(causal, scores, -np.inf).astype(query.dtype)
        most = np.maximum(highest, scores.max(axis=1, keepdims=True))
        rescaling, weights = exp(highest - most), exp(scores - most)
        total = total * rescaling + weights.sum(axis=1, keepdims=True)
        context = context * rescaling + weights @ value[start:stop]
        highest = most
    return context / total, highest + np.log(total)


def test_softmax_in_blocks_with_rescaling_stays_within_the_bounds():
    """One head without projections: identity weights. Scores rise, so that every block rescales."""
    rng = np.random.default_rng(0)
    length, D = 64, 8
    identity = Projection(np.eye(D, dtype=F32))
    attention = Attention(1, 1, D)
    for size in (1.0, 3.0):
        x = (rng.normal(0, size, (1, length, D)) + np.linspace(0, 2, length)[:, None]).astype(F32)
        dy = rng.standard_normal(x.shape).astype(F32)
        block = Block(x, dy, Projections(*[identity] * 4), attention, None, None)
        scale = np.float32(attention.score_scale)
        y, lse = in_blocks(x[0], x[0], x[0], scale, 16, np.exp)
        # The backward pass of a fused kernel: from log sum exp, and from the context.
        p = np.where(np.tri(length, dtype=bool), np.exp(x[0] @ x[0].T * scale - lse), 0).astype(F32)
        delta = (dy[0] * y).sum(axis=1, keepdims=True)
        dscores = p * (dy[0] @ x[0].T - delta)
        dx = dscores @ x[0] * scale + dscores.T @ x[0] * scale + p.T @ dy[0]
        assert not outside({"y": y[None], "dx": dx[None]}, block, F32)


def test_a_less_accurate_exponential_needs_to_be_said():
    """One head, identity weights, an exponential that is off by 500 ulps one way or the other."""
    rng = np.random.default_rng(1)
    x = rng.normal(0, 0.05, (1, 12, 2)).astype(F32)
    x[..., 0] = np.where(rng.random(12) < 0.5, 1e-3, -1e-3)
    block = Block(x, x, Projections(*[Projection(np.eye(2, dtype=F32))] * 4), Attention(1, 1, 2), None, None)

    def rough(values):
        return (np.exp(values) * (1 + 1000 * U32 * np.sign(rng.random(values.shape) - 0.5))).astype(F32)

    y, _ = in_blocks(x[0], x[0], x[0], np.float32(2**-0.5), 16, rough)
    exact = forward(block.astype(F64))
    difference = np.abs(y - exact)[0]
    arguments = (block.x, block.projections, block.attention, F32)
    assert (difference <= attention_forward_bound(*arguments, exp_ulps=501)[0]).all()
    assert (difference > attention_forward_bound(*arguments, exp_ulps=4)[0]).any()
    assert np.array_equal(
        attention_forward_bound(*arguments), attention_forward_bound(*arguments, exp_ulps=4)
    )


def test_a_float32_accumulator_tightens_the_bound_of_bfloat16():
    block = gaussian_block(4, length=6, d=12, dtype=BF16)
    exact = forward(block.astype(F64))
    arguments = (block.x, block.projections, block.attention)
    narrow = attention_forward_bound(*arguments, BF16, rotary=block.rotary)
    wide = attention_forward_bound(*arguments, Precision(BF16, accumulator=F32), rotary=block.rotary)
    assert (wide < narrow).all()
    assert (np.abs(forward(block).astype(F64) - exact) <= wide).all()
    tf32 = attention_forward_bound(*arguments, Precision(F32, multiplicands="tf32"), rotary=block.rotary)
    plain = attention_forward_bound(*arguments, F32, rotary=block.rotary)
    assert (plain < tf32).all()


def ball(centre, radius, dtype=F32, unit=0.0):
    centre = np.asarray(centre, F64)
    return Ball(centre, np.broadcast_to(np.asarray(radius, F64), centre.shape), unit, Precision.of(dtype))


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 2.0]))
def test_a_probability_moves_as_far_as_softmax_ball_says_and_no_farther(keys, seed, most):
    """Each extreme is reached: one score at one end of its interval, the others at the other."""
    rng = np.random.default_rng(seed)
    centre, radius = rng.normal(0, 2, (3, keys)), rng.random((3, keys)) * most
    counts = (rng.random((3, keys)) < 0.8) | (np.arange(keys) == rng.integers(keys))
    found = softmax_ball(ball(centre, radius, F32), counts, 1.0)
    p = softmax(centre, counts)
    assert np.array_equal(found.centre, p)
    extreme = np.zeros_like(p)
    for key in range(keys):
        for sign in (1, -1):
            moved = softmax(centre + sign * radius * np.where(np.arange(keys) == key, 1, -1), counts)
            extreme[:, key] = np.maximum(extreme[:, key], np.abs(moved - p)[:, key])
    assert (found.radius[~counts] == 0).all()
    assert (extreme <= found.radius).all()
    assert (found.radius <= extreme * (1 + 1e-3) + 200 * U32).all()


def test_softmax_ball_counts_what_rounding_does():
    """Four equal scores of 2: by hand, from the docstring's parts."""
    for keys, rescalings in ((4, 0), (16, 0), (17, 1), (33, 2)):
        scores = ball(np.full((1, keys), 2.0), 0.0, F32, 2.0**-126)
        found = softmax_ball(scores, np.ones((1, keys), bool), 4.0)
        p = 1 / keys
        shift = gamma(8, U32) * (1 + rescalings) + U32 * (2 * 2 + 6 * math.log(keys) + 1)
        moved = p * (1 - p) * 2 * shift
        rounded = p * (gamma(keys + 2 * rescalings, U32) + gamma(3, U32))
        lost = 2 * (2 + rescalings) * 2.0**-126
        assert found.radius[0, 0] == pytest.approx(moved + rounded + lost, rel=1e-4)
    tiny = ball(np.array([[0.0, -200.0]]), 0.0, F32, 2.0**-126)
    assert softmax_ball(tiny, np.ones((1, 2), bool), 4.0).radius[0, 1] == pytest.approx(2.0**-124, rel=1e-6)
    # A gap of g costs 4 g u of the argument.
    gap = ball(np.array([[0.0, -3.0]]), 0.0, F32)
    p = 1 / (1 + math.exp(3))
    first, second = (gamma(8, U32) + U32 * (4 * g + 2 * 3 + 6 * math.log(2) + 1) for g in (0, 3))
    moved = p * (1 - p) * (first + second) + p * (gamma(2, U32) + gamma(3, U32))
    assert softmax_ball(gap, np.ones((1, 2), bool), 4.0).radius[0, 1] == pytest.approx(moved, rel=1e-4)


def test_scores_that_are_all_negative_have_the_gap_and_level_of_their_own():
    below = softmax_ball(ball([[-9.0, -9.0]], 0.0), np.ones((1, 2), bool), 4.0)
    above = softmax_ball(ball([[9.0, 9.0]], 0.0), np.ones((1, 2), bool), 4.0)
    assert np.array_equal(below.radius, above.radius)
    # A radius r is in the highest and in the lowest score that is computed: a gap of 4 r, a level of 9 + 2 r.
    r = 2.0**-4
    wide = softmax_ball(ball([[9.0, 9.0]], r), np.ones((1, 2), bool), 4.0)
    off = gamma(8, U32) + U32 * (4 * 4 * r + 2 * (9 + 2 * r) + 6 * math.log(2) + 1)
    rounded = gamma(2, U32) + gamma(3, U32)
    moved = math.tanh(r + off) / 2
    assert wide.radius[0, 0] == pytest.approx(moved + (moved + 0.5) * rounded, rel=1e-7)


def test_scores_of_which_nothing_is_known_give_probabilities_from_0_to_1():
    found = softmax_ball(ball(np.zeros((1, 3)), np.array([[0.0, 0.0, 1e6]])), np.ones((1, 3), bool), 4.0)
    assert (found.radius >= 1).all()
    assert np.isfinite(found.radius).all()
    found = softmax_ball(ball(np.zeros((2, 3)), np.array([[20.0], [1e-3]])), np.ones((2, 3), bool), 4.0)
    assert found.radius[0] == pytest.approx(2 / 3, rel=1e-5)
    assert (found.radius[1] < 1e-3).all()


@pytest.mark.parametrize("radius", [30.0, 50.0, 299.0])
def test_the_only_key_has_probability_1_however_little_is_known_of_its_score(radius):
    alone = softmax_ball(ball(np.zeros((1, 1)), radius), np.ones((1, 1), bool), 4.0)
    masked = softmax_ball(ball(np.zeros((1, 2)), radius), np.array([[True, False]]), 4.0)
    assert U32 < alone.radius[0, 0] <= masked.radius[0, 0]
    assert masked.radius[0, 0] < 10 * U32
    assert masked.radius[0, 1] == 0


def test_balls_add_what_their_parts_lose():
    """Every operation against its formula, with radii that are no rounding errors."""
    precision, unit = Precision(F16, accumulator=F32), 2.0**-20
    u, wide = 2.0**-11, U32
    a = Ball(np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([[0.1, 0.2], [0.3, 0.4]]), unit, precision)
    b = Ball(np.array([[2.0, 1.0], [-1.0, 4.0]]), np.array([[0.5, 0.6], [0.7, 0.8]]), unit, precision)
    size, reach = np.abs(a.centre) + a.radius, np.abs(a.centre) + 2 * a.radius
    reach_b = np.abs(b.centre) + 2 * b.radius
    assert np.allclose(a.size, size, rtol=1e-15)
    assert np.allclose(a.reach, reach, rtol=1e-15)

    def check(found, centre, radius):
        assert np.array_equal(found.centre, centre)
        assert np.allclose(found.radius, radius, rtol=1e-8, atol=0)
        assert (found.unit, found.precision) == (unit, precision)

    growth = precision.growth(2, 1, 1, 1.0)
    assert growth == pytest.approx(gamma(2, wide) + gamma(1, u), rel=1e-6)
    check(
        a @ b,
        a.centre @ b.centre,
        size @ b.radius + a.radius @ reach_b + growth * (reach @ reach_b) + 4 * unit,
    )
    check(
        a * b,
        a.centre * b.centre,
        size * b.radius + a.radius * reach_b + gamma(1, u) * reach * reach_b + unit,
    )
    for found, centre in ((a + b, a.centre + b.centre), (a - b, a.centre - b.centre)):
        check(found, centre, a.radius + b.radius + gamma(1, u) * (reach + reach_b) + unit)
    check(a.scaled(-3.0), a.centre * -3, 3 * (a.radius + gamma(5, u) * reach) + unit)
    check(a.map(lambda v: v.T), a.centre.T, a.radius.T)
    growth = precision.growth(2, 1, 0, 1.0)
    summed = a.add_up(lambda v: v.sum(axis=-1, keepdims=True), 2)
    check(
        summed,
        a.centre.sum(axis=-1, keepdims=True),
        (a.radius + growth * reach + unit).sum(axis=-1, keepdims=True),
    )
    check(a.or_else(b), a.centre, b.radius)
    assert (a.bound > a.radius).all()
    assert (a.bound < a.radius * (1 + 2.0**-29)).all()
    assert a.shape == (2, 2)
    magnitude = a.magnitude
    assert np.allclose(magnitude.size, reach, rtol=1e-15)
    assert (magnitude.lost == unit).all()
    assert (magnitude.stores, magnitude.unit) == (0, unit)
    plain = ball([[1.0, 2.0]], 0.0, F32)
    assert (plain @ plain.map(np.transpose)).radius[0, 0] == pytest.approx(5 * gamma(2, U32), rel=1e-6)
    assert plain.add_up(lambda v: v.sum(axis=-1), 2).radius[0] == pytest.approx(3 * gamma(2, U32), rel=1e-6)


def test_an_input_that_is_no_number_of_the_dtype_is_rounded_first():
    values = np.array([1.0, -3.0])
    for dtype, form, rounded in ((F32, F32, False), (F64, F32, True), (F16, BF16, True), (BF16, F16, True)):
        found = Ball.of(values.astype(dtype), Precision(form), 2.0**-30)
        u = Precision(form).form.unit_roundoff
        assert np.array_equal(found.centre, values)
        expected = u * np.abs(values) + 2.0**-30 if rounded else np.zeros(2)
        assert np.array_equal(found.radius, expected)
    assert not Ball.of(values.astype(F16), Precision(F32), 1.0).radius.any()
    wide, narrow = gaussian_block(0, dtype=F64), gaussian_block(0, dtype=F32)
    assert (bounds_of(wide, F32)["y"] > bounds_of(narrow, F32)["y"]).all()


def test_a_block_of_values_alone_has_the_bound_of_its_projections():
    """One token: the probability is 1, and what is left are v, a product with 1, and o."""
    block = gaussian_block(0, n=1, length=1, heads=(1, 1, 4), rotary=False, keep=1.0)
    own = block.projections
    first = adapted_linear_forward_bound(block.x, own.v.W0, own.v.adapters, F32, bias=own.v.bias)
    v = np.abs(block.x.astype(F64) @ own.v.W0.T.astype(F64))
    adapter = own.o.adapters[0]
    W = np.abs(own.o.W0.astype(F64)) + abs(adapter.scaling) * np.abs(adapter.B).astype(F64) @ np.abs(
        adapter.A
    )
    found = attention_forward_bound(block.x, own, block.attention, F32)
    assert v.shape == (1, 1, 4)
    assert (found > first @ W.T).all()
    assert (found < 40 * first @ W.T).all()


def test_bounds_have_the_shapes_of_what_they_bound():
    for adapters in (0, 1, 2):
        block = gaussian_block(0, adapters=adapters, masked=True, dtype=F32)
        bounds = bounds_of(block, F32)
        for name, array in everything(block).items():
            assert bounds[name].shape == array.shape, name
            assert bounds[name].dtype == F64
            assert (bounds[name] > 0).all()
    own = attention_backward_bound(block.dy, block.x, block.projections, block.attention, F32)
    assert own.q.adapters[0].dbias is None
    assert own.q.adapters[1].dbias.shape == (16,)


def test_a_sign_of_the_inputs_or_of_the_scalings_changes_no_more_than_the_cancellation():
    """Balls of -x are those of x: every size is a magnitude. y and v change sign, so do their gradients."""
    block = gaussian_block(0, rotary=False, adapters=2, keep=1.0)
    bare = block
    for name in NAMES:
        own = getattr(block.projections, name)
        bare = bare.with_projection(name, bias=None, adapters=own.adapters[:1])
    flipped = bare._replace(x=-bare.x)
    for name, array in bounds_of(bare, F32).items():
        assert np.allclose(array, bounds_of(flipped, F32)[name], rtol=1e-12), name
    negative = bare
    for name in ("v", "o"):
        adapter = getattr(bare.projections, name).adapters[0]
        negative = negative.with_projection(
            name,
            W0=-getattr(bare.projections, name).W0,
            adapters=(replace(adapter, scaling=-adapter.scaling),),
        )
    for name, array in bounds_of(bare, F32).items():
        assert np.allclose(array, bounds_of(negative, F32)[name], rtol=1e-12), name


def test_wrong_arguments_are_refused():
    block = gaussian_block(0, dtype=F64)
    arguments = (block.projections, block.attention)
    with pytest.raises(ShapeError, match=r"^x: expected \(N, T, d\)"):
        attention_forward_bound(block.x[0], *arguments, F32)
    with pytest.raises(ShapeError, match=r"^dy: expected \(2, 5, 8\)"):
        attention_backward_bound(block.dy[0], block.x, *arguments, F32)
    with pytest.raises(ShapeError, match=r"^mask: expected"):
        attention_forward_bound(block.x, *arguments, F32, mask=np.ones(5, bool))
    with pytest.raises(DTypeError, match=r"^dtype: expected one of"):
        attention_forward_bound(block.x, *arguments, np.int8)
    with pytest.raises(DTypeError, match=r"^tensor: expected one of"):
        attention_forward_bound(block.x.astype(int), *arguments, F32)
    with pytest.raises(
        ConfigError,
        match=r"^failure: expected None, got 0\.1; errors that pass softmax are not independent$",
    ):
        attention_forward_bound(block.x, *arguments, Precision(F32, failure=0.1))
    for ulps in (0.5, np.nan):
        with pytest.raises(
            ConfigError, match=rf"^exp_ulps: expected 1 or more, got {ulps}; no exponential is better$"
        ):
            attention_backward_bound(block.dy, block.x, *arguments, F32, exp_ulps=ulps)
    long = gaussian_block(0, n=1, length=256, d=2, heads=(1, 1, 2))
    with pytest.raises(ConfigError, match=r"^gamma: expected n \* u below 1"):
        attention_forward_bound(long.x, long.projections, long.attention, BF16)
    # Where float16 products underflow the bound is not zero.
    tiny = block.map(lambda array: (array * 0 + 2.0**-24).astype(F16))
    assert (bounds_of(tiny, F16)["y"] >= 2.0**-24).all()


def radii_by_hand(centre, radius, counts, unit, ulps, u=U32):
    """The radius of each probability of one row, from the docstring's parts, one number at a time."""
    keys = len(centre)
    kept = [j for j in range(keys) if counts[j]]
    rescalings = math.ceil(keys / 16) - 1
    top = max(centre[k] for k in kept)
    weights = [math.exp(centre[j] - top) if counts[j] else 0.0 for j in range(keys)]
    p = [weight / math.fsum(weights) for weight in weights]
    highest = max(centre[j] + 2 * radius[j] for j in kept)
    level = max(abs(centre[j]) + 2 * radius[j] for j in kept)
    off = [
        gamma(math.ceil(2 * ulps), u) * (1 + rescalings)
        + u * (4 * (highest - centre[j] + 2 * radius[j]) + 2 * level + 6 * math.log(keys) + 1)
        for j in range(keys)
    ]
    shift = [radius[j] + off[j] if j in kept else 0.0 for j in range(keys)]
    own = math.exp(6 * min(max(shift), 300.0) * 2.0**-53 / u)
    summed, stored = gamma(keys + 2 * rescalings, u), gamma(3, u)
    growth = summed + stored + summed * stored
    found = []
    for j in range(keys):
        if j not in kept:
            found.append(0.0)
            continue
        moved = []
        for sign in (1, -1):
            away = [s * sign if k == j else -s * sign for k, s in enumerate(shift)]
            terms = [p[k] * math.exp(away[k]) for k in range(keys)]
            rest = math.fsum(p[k] * (math.exp(away[j]) - math.exp(away[k])) for k in range(keys) if k != j)
            moved.append(abs(rest) / math.fsum(terms))
        relative = max(moved) * own
        known = p[j] * own * (relative + growth * (1 + relative))
        at_all = (1 + growth) * math.exp(min(off[j], 600.0))
        bound = at_all if max(shift) > 300 else min(known, at_all)
        found.append(bound + 2 * (2 + rescalings) * unit)
    return found


@pytest.mark.parametrize("keys", [3, 20, 40])
@pytest.mark.parametrize("size", [0.01, 2.0, 20.0])
def test_softmax_ball_is_its_docstring_row_by_row(keys, size):
    """Rows of different scores, radii and masks; what does not count is higher and less known."""
    rng = np.random.default_rng(keys)
    sizes = np.array([[size], [1.0], [0.1], [size / 2]])
    centre = rng.normal(size=(4, keys)) * sizes - np.arange(4)[:, None]
    radius = rng.uniform(0, 1, (4, keys)) * np.array([[0.5], [1e-3], [1e-9], [size]])
    counts = rng.random((4, keys)) < 0.7
    counts[:, 0] = True
    centre[~counts], radius[~counts] = 90.0, 700.0
    for unit in (2.0**-126, 2.0**-30):
        found = softmax_ball(ball(centre, radius, F32, unit), counts, 2.5).radius
        expected = [radii_by_hand(*row, unit, 2.5) for row in zip(centre, radius, counts, strict=True)]
        assert found == pytest.approx(np.array(expected), rel=1e-9, abs=0)


def test_a_score_that_is_not_known_is_told_by_the_widest_of_its_row():
    for width in (299.0, 301.0):
        centre, radius, counts = [0.0, 1.0], [0.1, width], [True, True]
        found = softmax_ball(ball([centre], [radius]), np.array([counts]), 4.0).radius[0]
        assert found == pytest.approx(np.array(radii_by_hand(centre, radius, counts, 0.0, 4.0)), rel=1e-9)


@pytest.mark.parametrize("part", ["rotary", "mask", "q", "k", "v", "o"])
def test_every_part_of_a_block_has_its_share_in_the_bounds(part):
    """Without the tables, the mask, or a projection's bias, the bounds are others."""
    small = {"n": 1, "length": 4, "d": 5, "heads": (2, 1, 4)}
    block = gaussian_block(3, **small, adapters=1, rotary=True, masked=True, dtype=F32)
    bounds = bounds_of(block, F32)
    if part in ("rotary", "mask"):
        changed = bounds_of(block, F32, **{part: None})
    else:
        changed = bounds_of(block.with_projection(part, bias=None), F32)
    for name in ("y", "dx") if part != "o" else ("y",):
        assert not np.array_equal(changed[name], bounds[name]), name


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_the_gradient_of_x_has_the_bound_of_each_projection_it_comes_through(part):
    """The other two projections are their biases alone, so nothing comes through them."""
    block = gaussian_block(5, n=1, length=4, d=5, heads=(2, 1, 4), adapters=1, dtype=F32)
    for name in {"q", "k", "v"} - {part}:
        own = getattr(block.projections, name)
        block = block.with_projection(name, W0=np.zeros_like(own.W0), adapters=())
    dx = bounds_of(block, F32)["dx"]
    heavy = bounds_of(block._replace(dy=block.dy * F32.type(1024)), F32)["dx"]
    assert (heavy > 1000 * dx).all()
    assert (dx > U32 * np.abs(everything(block)["dx"])).all()
    assert not outside({"dx": everything(block)["dx"]}, block, F32)


@pytest.mark.parametrize("rotary", [True, False])
def test_gradients_are_rotated_back_where_queries_and_keys_were_rotated(monkeypatch, rotary):
    module = sys.modules["loracle.reference.attention_bounds"]
    plain, seen = module.attend_backward, []

    def logged(dcontext, forward, attention, tables, mean):
        seen.append(tables)
        return plain(dcontext, forward, attention, tables, mean)

    monkeypatch.setattr(module, "attend_backward", logged)
    bounds_of(gaussian_block(3, n=1, length=4, d=5, heads=(2, 1, 4), rotary=rotary, dtype=F32), F32)
    assert [tables is not None for tables in seen] == [rotary]


def test_the_adapters_bias_moves_the_context_and_with_it_the_output():
    block = gaussian_block(3, n=1, length=4, d=5, heads=(2, 1, 4), adapters=1, dtype=F32)
    own = block.projections.v.adapters[0]
    plain = bounds_of(block.with_projection("v", adapters=(replace(own, bias=None),)), F32)
    biased = bounds_of(block.with_projection("v", adapters=(replace(own, bias=np.full(4, 50, F32)),)), F32)
    assert (biased["y"] > 2 * plain["y"]).all()


def test_a_projections_bias_moves_the_context_and_with_it_the_output():
    block = gaussian_block(3, n=1, length=4, d=5, heads=(2, 1, 4), adapters=1, dtype=F32)
    plain = bounds_of(block, F32)
    biased = bounds_of(block.with_projection("v", bias=np.full(4, 50, F32)), F32)
    assert (biased["y"] > 2 * plain["y"]).all()


def test_an_exponential_may_be_as_good_as_one_ulp():
    block = gaussian_block(0, n=1, length=3, d=4, heads=(1, 1, 2), dtype=F32)
    best, next_best = (bounds_of(block, F32, exp_ulps=ulps)["y"] for ulps in (1.0, 1.5))
    assert (best[:, 1:] < next_best[:, 1:]).all()  # the first token sees itself alone


def test_tables_that_do_not_fit_are_refused_by_every_function():
    block = gaussian_block(0, dtype=F64, rotary=True)
    wrong = (block.rotary[0][:-1], block.rotary[1])
    for function in (attention_forward_bound, attention_scores):
        options = {"precision": F32} if function is attention_forward_bound else {}
        with pytest.raises(ShapeError, match=r"^cos: expected"):
            function(block.x, block.projections, block.attention, rotary=wrong, **options)


def test_bounds_are_rounded_up():
    """What float64 may lose in evaluating a bound is added to it, in every gradient."""
    block = gaussian_block(3, n=1, length=3, d=4, heads=(1, 1, 2), adapters=1, dtype=F32)
    module = sys.modules["loracle.reference.attention_bounds"]
    assert module._up(np.ones(1))[0] == ROUND_UP > 1
    assert set(bounds_of(block, F32)) >= {"y", "dx", "q.dA", "v.dB", "o.dbias"}
