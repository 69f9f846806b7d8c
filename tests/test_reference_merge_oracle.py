"""The merge against rational arithmetic: at least 100,000 random entries in every dtype, bit for bit."""

import numpy as np
import pytest

from loracle.reference import merge, merge_exact, round_float64
from loracle.reference.formats import FORMATS, float_format

F32 = np.dtype(np.float32)
DTYPES = [form.dtype for form in FORMATS]
SHAPE = (102, 99)


def like_a_model(rng, dtype, r):
    """Weights and updates of ordinary sizes, W0 ten times as large as the update."""
    W0 = rng.standard_normal(SHAPE) * 0.02
    A, B = rng.standard_normal((r, SHAPE[1])) * 0.1, rng.standard_normal((SHAPE[0], r)) * 0.02
    return W0.astype(dtype), A.astype(F32), B.astype(F32)


def of_all_exponents(rng, dtype, r):
    """Entries from the subnormals of the dtype up, updates from far below W0 to far above it."""
    form = float_format(dtype)
    low, high = form.min_exponent - form.precision, form.max_exponent - 8
    W0 = np.ldexp(rng.uniform(-2, 2, SHAPE), rng.integers(low, high, (SHAPE[0], 1)))
    A = np.ldexp(rng.uniform(-2, 2, (r, SHAPE[1])), rng.integers(low // 2, high // 2, (1, SHAPE[1])))
    B = np.ldexp(rng.uniform(-2, 2, (SHAPE[0], r)), rng.integers(low // 2, high // 2, (SHAPE[0], 1)))
    return round_float64(W0, dtype), A, B


def near_ties(rng, dtype, r):
    """Short numbers, so that many sums are midpoints of the dtype or lie 2^-40 beside one."""
    p = float_format(dtype).precision
    W0 = (1 + rng.integers(0, 2 ** (p - 1), SHAPE) * 2.0 ** (1 - p)) * rng.choice([-1, 1], SHAPE)
    A = rng.integers(-3, 4, (r, SHAPE[1])) * 1.0
    B = rng.integers(-3, 4, (SHAPE[0], r)) * 2.0**-p
    A[-1] += rng.choice([0, 0, 2.0**-40, -(2.0**-40)], SHAPE[1])
    return W0.astype(dtype), A, B


def cancelling(rng, dtype, r):
    """Updates that take W0 away but for a few of its last bits, or all of it."""
    W0 = rng.standard_normal(SHAPE).astype(dtype)
    A, B = rng.standard_normal((r, SHAPE[1])), rng.standard_normal((SHAPE[0], r)) * 2.0**-20
    rows = rng.integers(0, SHAPE[0], SHAPE[1])
    A[0] = -W0[rows, np.arange(SHAPE[1])].astype(float) * (1 + rng.integers(-3, 4, SHAPE[1]) * 2.0**-12)
    B[:, 0] = 1
    return W0, A, B


KINDS = [like_a_model, of_all_exponents, near_ties, cancelling]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_entry_is_the_exact_one_rounded_once(dtype, kind):
    """4 kinds of 10,098 entries, each for 3 ranks and scalings: 121,176 entries in each dtype."""
    for r, scaling in ((1, 2.0), (3, 1 / 3), (2, -0.75)):
        W0, A, B = kind(np.random.default_rng(r), dtype, r)
        merged, exact = merge(W0, A, B, scaling), merge_exact(W0, A, B, scaling, dtype)
        bits = float_format(dtype).bits
        wrong = np.argwhere(merged.view(bits) != exact.view(bits))
        assert not wrong.size, (r, wrong[:3].tolist())
    assert len(KINDS) * 3 * W0.size >= 100_000
