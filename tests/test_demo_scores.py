"""Scores are the libraries' own, sums give the same corpus score, and the bootstrap knows luck from skill."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from loracle.demo.scores import Scores, chrf, paired_bootstrap, rouge_l
from loracle.reference import ShapeError
from loracle.reference.formats import float_format

TEXT = st.text("abcé x.", max_size=24)
# A corpus score is a few dozen additions, divisions and products of numbers in [0, 100].
TOLERANCE = 100 * 64 * float_format(np.float64).unit_roundoff

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl", "elk", "ant", "bee", "eel")
REFERENCES = [f"the {word} sat on the {word} mat" for word in ANIMALS]
POOR = [f"{word} is not here" for word in ANIMALS]
GOOD = [reference.replace("mat", "rug") for reference in REFERENCES]


def mean_of_sums(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (m,) means of (m, 2) sums and counts."""
    return np.asarray(sums[:, 0] / sums[:, 1])


def mean_scores(values: NDArray[np.float64]) -> Scores:
    """Return the scores of a system whose corpus score is the mean over sentences."""
    return Scores(
        "m", float(values.mean()), values, np.stack([values, np.ones_like(values)], axis=1), mean_of_sums
    )


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
def test_sums_give_sacrebleus_corpus_score(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = ([pair[i] for pair in pairs] for i in (0, 1))
    scores = chrf(hypotheses, references)
    whole = scores.aggregate(scores.statistics.sum(axis=0, keepdims=True))
    assert abs(whole[0] - CHRF().corpus_score(hypotheses, [references]).score) <= TOLERANCE
    assert scores.corpus == CHRF().corpus_score(hypotheses, [references]).score
    alone = scores.aggregate(scores.statistics)
    assert np.abs(alone - scores.sentences).max() <= TOLERANCE


def test_chrf_by_hand() -> None:
    # "ab" against "abc": unigrams 2 of 2 and 2 of 3, bigrams 1 of 1 and 1 of 2; no trigram in the hypothesis.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert abs(chrf(["ab"], ["abc"]).corpus - expected) <= TOLERANCE


def test_rouge_l_is_the_mean_of_the_librarys_f1() -> None:
    scorer = RougeScorer(["rougeL"])
    each = [100 * scorer.score(r, h)["rougeL"].fmeasure for r, h in zip(REFERENCES, GOOD, strict=True)]
    scores = rouge_l(GOOD, REFERENCES)
    assert scores.sentences.tolist() == each
    assert abs(scores.corpus - sum(each) / len(each)) <= TOLERANCE
    assert abs(scores.aggregate(scores.statistics.sum(axis=0, keepdims=True))[0] - scores.corpus) <= TOLERANCE


def test_rouge_l_by_hand() -> None:
    assert rouge_l(["tensors"], ["tensor"]).corpus == 0, "words are not stemmed"
    # The longest common subsequence is "a c": precision 2/3, recall 2/4.
    assert (
        abs(rouge_l(["a x c"], ["a b c d"]).corpus - 100 * 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
        <= TOLERANCE
    )


@pytest.mark.parametrize("score", [chrf, rouge_l])
def test_equal_answers_are_no_improvement(score: type[Scores]) -> None:
    same = score(GOOD, REFERENCES)  # type: ignore[call-arg, arg-type]
    comparison = paired_bootstrap(same, same, resamples=200)
    assert comparison.p_value == 1.0
    assert (comparison.low, comparison.high) == (0.0, 0.0)


@pytest.mark.parametrize("score", [chrf, rouge_l])
def test_better_answers_are_better_and_worse_ones_are_not(score: type[Scores]) -> None:
    poor, good = score(POOR, REFERENCES), score(GOOD, REFERENCES)  # type: ignore[call-arg, arg-type]
    better = paired_bootstrap(poor, good, resamples=999)
    assert better.p_value == 1 / 1000
    assert 0 < better.low <= better.after - better.before <= better.high
    assert (better.before, better.after) == (poor.corpus, good.corpus)
    assert paired_bootstrap(good, poor, resamples=999).p_value == 1.0


def test_the_p_value_is_that_of_the_one_sentence_that_matters() -> None:
    # One of n = 8 answers is better, the others are equal: a resample shows it unless it misses that one,
    # with probability (1 - 1/8)^8.
    before = REFERENCES[:8]
    scores = rouge_l(["nothing", *before[1:]], before), rouge_l(before, before)
    miss, resamples = (7 / 8) ** 8, 10_000
    deviation = (miss * (1 - miss) / resamples) ** 0.5
    assert abs(paired_bootstrap(*scores, seed=3, resamples=resamples).p_value - miss) < 4 * deviation


def test_the_interval_is_that_of_a_mean() -> None:
    # The mean of n independent differences is nearly normal; 4000 resamples place a 2.5th percentile of it
    # within a fifth of a standard error.
    size = np.arange(1.0, 31.0)
    differences = 5 + np.concatenate([size, -size])
    comparison = paired_bootstrap(mean_scores(0 * differences), mean_scores(differences), resamples=4000)
    error = differences.std() / len(differences) ** 0.5
    assert abs(comparison.low - (5 - 1.96 * error)) < 0.2 * error
    assert abs(comparison.high - (5 + 1.96 * error)) < 0.2 * error


def test_luck_is_not_skill() -> None:
    noise = np.random.default_rng(1).normal(0, 1, (2, 40))
    systems = [mean_scores(x) for x in noise - noise.mean(axis=1, keepdims=True)]
    assert 0.4 < paired_bootstrap(*systems, resamples=2000).p_value < 0.6


def test_the_seed_decides() -> None:
    systems = rouge_l(POOR[:5] + REFERENCES[5:], REFERENCES), rouge_l(POOR[:4] + GOOD[4:], REFERENCES)
    first = paired_bootstrap(*systems, seed=1, resamples=1500)
    assert first == paired_bootstrap(*systems, seed=1, resamples=1500)
    other = paired_bootstrap(*systems, seed=2, resamples=1500)
    assert (first.low, first.high, first.p_value) != (other.low, other.high, other.p_value)
    assert (first.seed, first.resamples) == (1, 1500)


@pytest.mark.parametrize("score", [chrf, rouge_l])
@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_sizes_must_match(score: type[Scores], hypotheses: list[str], references: list[str]) -> None:
    with pytest.raises(ShapeError, match=f"got {len(hypotheses)} and {len(references)}"):
        score(hypotheses, references)  # type: ignore[call-arg, arg-type]


def test_systems_must_match() -> None:
    few, many = rouge_l(GOOD[:2], REFERENCES[:2]), rouge_l(GOOD, REFERENCES)
    for before, after, resamples in ((few, many, 9), (replace(many, metric="m"), many, 9), (many, many, 0)):
        with pytest.raises(
            ShapeError, match="expected one metric, one set of sentences and at least 1 resample"
        ):
            paired_bootstrap(before, after, resamples=resamples)
