"""The distribution of the next token against transformers' processors in float64, and drawing from it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from loracle.export import Sampling
from loracle.export.sampling import Sampler, distribution, draw
from loracle.reference import ConfigError, NonFiniteError, ShapeError

U = 2.0**-24
DRAWN = Sampling(temperature=1.0)


def transformers_scores(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What transformers' generation makes of float64 logits; -inf is what it excludes."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores[0].numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()


def relative_errors(scores: np.ndarray) -> np.ndarray:
    """Bound on the relative error of each float32 probability.

    The exponent x has two roundings (difference, quotient), which x multiplies; the exponential is within 4
    units in the last place, 8 roundings; two quotients follow. The sum errs as its terms do on average.
    """
    x = np.where(np.isfinite(scores), scores.max() - scores, 0)
    own = (2 * x + 10) * U
    return own + np.sum(softmax(scores) * own)


def check_probabilities(ids: np.ndarray, p: np.ndarray, scores: np.ndarray) -> None:
    """Against the softmax of the scores; below the normal numbers of float32 an error may be all of them."""
    expected = softmax(scores)[ids]
    bound = expected * relative_errors(scores)[ids] + np.finfo(np.float32).tiny
    assert p.dtype == np.float32
    assert np.all(np.abs(p - expected) <= bound)
    assert not p[scores[ids] == -np.inf].any()


values = st.one_of(
    st.sampled_from([-np.inf, -2.0, 0.0, 0.0, 1.0, 3.0]),  # ties
    st.floats(-30, 30, width=32),
)
logit_rows = st.lists(values, min_size=1, max_size=40).filter(lambda row: max(row) > -np.inf)
temperatures = st.floats(0.125, 8)


@given(logit_rows, temperatures, st.integers(0, 45))
def test_top_k_keeps_the_tokens_that_transformers_keeps(
    row: list[float], temperature: float, top_k: int
) -> None:
    logits = np.array(row, np.float32)
    sampling = Sampling(temperature, top_k)
    scores = transformers_scores(logits, sampling)
    ids, p = distribution(logits, sampling)
    assert np.array_equal(ids[logits[ids] > -np.inf], np.flatnonzero(scores > -np.inf))
    check_probabilities(ids, p, scores)


@given(logit_rows, temperatures, st.integers(0, 45), st.floats(0, 1))
def test_top_p_keeps_as_many_of_the_most_likely_tokens_as_transformers(
    row: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    """Up to the rounding of the sums at which the run ends."""
    logits = np.array(row, np.float32)
    sampling = Sampling(temperature, top_k, top_p)
    before = transformers_scores(logits, replace(sampling, top_p=1.0))
    slack = float(np.sum(softmax(before) * relative_errors(before)))
    fewest, most = (
        np.count_nonzero(
            transformers_scores(logits, replace(sampling, top_p=min(max(top_p + side * slack, 0.0), 1.0)))
            > -np.inf
        )
        for side in (-1, 1)
    )
    ids, p = distribution(logits, sampling)
    kept = ids[logits[ids] > -np.inf]
    assert fewest <= len(kept) <= most
    # The most likely, of equals those of smaller id.
    order = sorted(range(len(row)), key=lambda token: (-logits[token], token))
    assert np.array_equal(kept, sorted(order[: len(kept)]))
    scores = np.full(len(row), -np.inf)
    scores[kept] = before[kept]
    check_probabilities(ids, p, scores)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=30, unique=True), temperatures)
def test_the_most_likely_token_alone_is_what_greedy_takes(row: list[float], temperature: float) -> None:
    logits = np.array(row, np.float32)
    expected = Sampler(Sampling(), [[1]]).choose(logits[None], [0])
    assert expected == [int(np.argmax(logits))]
    for one in (
        Sampling(temperature, top_k=1),
        Sampling(temperature, top_p=0.0),
        Sampling(float(np.finfo(np.float32).tiny)),
        Sampling(temperature, do_sample=False),
    ):
        assert Sampler(one, [[1]]).choose(logits[None], [0]) == expected


def test_nothing_is_cut_by_a_top_p_of_one_and_a_top_k_of_the_vocabulary() -> None:
    logits = np.array([3, -80, 1, 1, 0], np.float32)
    for top_k in (0, 5, 6, 10**9):
        ids, p = distribution(logits, Sampling(1.0, top_k, 1.0))
        assert np.array_equal(ids, range(5))
        assert np.all(p > 0)


@pytest.mark.parametrize(
    ("sampling", "count"),
    [(DRAWN, 8), (Sampling(1.0, top_k=3), 8), (Sampling(1.0, top_p=0.5), 4), (Sampling(1.0, top_p=0.0), 1)],
)
def test_equal_logits_are_equally_likely(sampling: Sampling, count: int) -> None:
    """Powers of two, so that every sum is exact: the run ends where it reaches top_p."""
    ids, p = distribution(np.full(8, 2.5, np.float32), sampling)
    assert np.array_equal(ids, range(count))
    assert np.array_equal(p, np.full(count, 1 / count))


@given(st.integers(1, 3), st.integers(0, 2**32 - 1), st.integers(2, 2000))
def test_the_k_th_largest_of_a_long_row_is_found_among_the_largest_of_groups(
    top_k: int, seed: int, spread: int
) -> None:
    """Rows long enough for groups, whose rest beyond whole groups may hold the largest."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-spread, 1, int(rng.integers(150, 1200))).astype(np.float32)
    ids, _ = distribution(logits, Sampling(1.0, top_k))
    assert np.array_equal(ids, np.flatnonzero(logits >= np.sort(logits)[-top_k]))


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, Sampling(0.5, 3), Sampling(0.5, 3, 0.5)])
@pytest.mark.parametrize(("value", "found"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "no finite one")])
def test_logits_that_are_no_numbers_are_refused(sampling: Sampling, value: float, found: str) -> None:
    logits = np.zeros((2, 40), np.float32)
    logits[1, 7 if value != -np.inf else slice(None)] = value
    refused(
        lambda: Sampler(sampling, [[1], [2]]).choose(logits, [0, 1]),
        NonFiniteError,
        f"logits: expected finite numbers or -inf, got {found}; a model in fp16 may overflow: export in fp32",
    )


def test_float16_logits_are_treated_as_the_float32_numbers_that_they_are() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 300)).astype(np.float16)
    for sampling in (Sampling(), DRAWN, Sampling(0.7, 20, 0.9)):
        rows = [Sampler(sampling, [[3]]).choose(one, [0]) for one in (logits, logits.astype(np.float32))]
        assert rows[0] == rows[1]


@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=1100).filter(any),
    st.integers(0, 2**20 - 1),
)
def test_a_number_falls_on_the_token_whose_share_it_is_in(weights: list[int], number: int) -> None:
    """Exact: sums of small integers, and a number with few bits. Several runs, some of them all zero."""
    place = draw(np.array(weights, np.float32), number / 2**20)
    target = Fraction(number, 2**20) * sum(weights)
    assert place == next(i for i, total in enumerate(accumulate(weights)) if total > target)


@pytest.mark.parametrize("count", [511, 512, 513, 1024, 1100])
def test_every_token_of_a_long_row_has_its_own_numbers(count: int) -> None:
    """Equal shares whose sums are exact: the middle of each falls on its own token, across all runs."""
    p = np.ones(count, np.float32)
    assert [draw(p, (token + 0.5) / count) for token in range(count)] == list(range(count))


@given(st.integers(0, 2**32 - 1), st.integers(1, 1500))
def test_the_largest_number_falls_on_a_token_that_may_come(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(count).astype(np.float32) * (rng.random(count) < 0.1)
    p[int(rng.integers(count))] = 0.3
    assert p[draw(p, 1 - 2.0**-53)] > 0
    assert p[draw(p, 0.0)] > 0


def drawn(sampling: Sampling, prompts: list[list[int]], row: int, steps: int = 20) -> list[int]:
    """Tokens of a row, all tokens being equally likely."""
    sampler = Sampler(sampling, prompts)
    logits = np.zeros((len(prompts), 1000), np.float32)
    return [sampler.choose(logits, range(len(prompts)))[row] for _ in range(steps)]


def test_what_is_drawn_for_a_row_depends_on_seed_and_prompt_and_not_on_the_batch() -> None:
    prompt, other = [5, 6], [7]
    alone = drawn(DRAWN, [prompt], 0)
    assert alone == drawn(DRAWN, [other, other, prompt, other], 2)
    assert alone != drawn(replace(DRAWN, seed=1), [prompt], 0)
    assert alone != drawn(DRAWN, [other], 0)
    # Equal prompts get different answers, each the same in every batch.
    again = drawn(DRAWN, [prompt, prompt], 1)
    assert again != alone
    assert again == drawn(DRAWN, [prompt, other, prompt], 2)


def test_a_row_that_goes_on_alone_keeps_its_stream() -> None:
    sampler = Sampler(DRAWN, [[1], [2]])
    logits = np.zeros((2, 1000), np.float32)
    tokens = [sampler.choose(logits, [0, 1])[1] for _ in range(3)]
    tokens += [sampler.choose(logits[:1], [1])[0] for _ in range(3)]
    assert tokens == drawn(DRAWN, [[2]], 0, 6)


def test_a_row_with_a_sampling_of_its_own_is_answered_as_alone() -> None:
    """Greedy rows and drawn ones, with equal prompts, in any order, and after others have ended."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 5, 300)).astype(np.float32)
    samplings = [DRAWN, Sampling(), replace(DRAWN, seed=4), DRAWN, Sampling(0.5, 20, 0.9, 4)]
    prompts = [[1, 2], [1, 2], [1, 2], [1, 2], [7]]
    together = Sampler(samplings, prompts)
    found = [together.choose(step, range(5)) for step in logits[:4]]
    found += [[*together.choose(step[[4, 1, 2]], [4, 1, 2])] for step in logits[4:]]
    for row, (sampling, prompt) in enumerate(zip(samplings, prompts, strict=True)):
        sampler = Sampler(sampling, [prompt])
        alone = [sampler.choose(step[[row]], [0])[0] for step in logits]
        assert [tokens[row] for tokens in found[:4]] == alone[:4]
        if row in (4, 1, 2):
            assert [tokens[[4, 1, 2].index(row)] for tokens in found[4:]] == alone[4:]
    assert [tokens[1] for tokens in found[:4]] == [int(step[1].argmax()) for step in logits[:4]]


def test_each_row_or_all_have_a_sampling() -> None:
    refused(
        lambda: Sampler([DRAWN], [[1], [2]]),
        ShapeError,
        "sampling: expected 2, one a row, got 1; give one for all",
    )


@pytest.mark.parametrize("greedy_row", [0, 1])
def test_logits_of_a_greedy_row_beside_a_drawn_one_are_checked(greedy_row: int) -> None:
    samplings = [DRAWN, DRAWN]
    samplings[greedy_row] = Sampling()
    logits = np.zeros((2, 40), np.float32)
    logits[greedy_row, 3] = np.nan
    with pytest.raises(NonFiniteError, match="got nan"):
        Sampler(samplings, [[1], [2]]).choose(logits, [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 (greedy), or 1.2e-38 to 3.4e+38, got -1.0"),
        ({"temperature": np.nan}, "temperature: expected 0 (greedy), or 1.2e-38 to 3.4e+38, got nan"),
        ({"temperature": 1e-40}, "temperature: expected 0 (greedy), or 1.2e-38 to 3.4e+38, got 1e-40"),
        ({"top_k": -1}, "top_k: expected 0 (all tokens) or more, got -1"),
        ({"top_p": 1.5}, "top_p: expected 0 to 1, got 1.5"),
        ({"top_p": np.nan}, "top_p: expected 0 to 1, got nan"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    refused(lambda: Sampling(**options), ConfigError, message)
