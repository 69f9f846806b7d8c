"""Score answers against references, and ask whether one system is better than another or was lucky.

Each metric is a function of sums over sentences, so a resample of the sentences costs one matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from loracle.reference import ShapeError

Array = NDArray[np.float64]
Aggregate = Callable[[Array], Array]

_BETA = 2.0
_RESAMPLES_AT_ONCE = 1000


@dataclass(frozen=True)
class Scores:
    """The scores of one system on n sentences, in percent.

    Attributes:
        metric: its name.
        corpus: the score of the whole.
        sentences: (n,), the score of each sentence on its own.
        statistics: (n, k), what is summed over sentences before the corpus score is computed.
        aggregate: (m, k) sums to the (m,) corpus scores.
    """

    metric: str
    corpus: float
    sentences: Array
    statistics: Array
    aggregate: Aggregate


@dataclass(frozen=True)
class Comparison:
    """How a system compares with another on the same sentences.

    Attributes:
        before: corpus score of the first system, percent.
        after: corpus score of the second.
        low: 2.5th percentile of ``after - before`` over the resamples.
        high: 97.5th percentile.
        p_value: see :func:`paired_bootstrap`.
        resamples: how many were drawn.
        seed: of the generator they were drawn with.
    """

    before: float
    after: float
    low: float
    high: float
    p_value: float
    resamples: int
    seed: int


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Return chrF2 as sacrebleu computes it: character 6-grams, beta 2, counts summed over the corpus.

    Raises:
        ShapeError: there are no sentences, or not one reference for each hypothesis.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    _check_sizes(hypotheses, references)
    metric = CHRF()
    statistics = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    return Scores(
        "chrF",
        float(metric.corpus_score(list(hypotheses), [list(references)]).score),
        np.array(
            [metric.sentence_score(h, [r]).score for h, r in zip(hypotheses, references, strict=True)],
            dtype=np.float64,
        ),
        np.asarray(statistics, dtype=np.float64),
        _chrf_of_sums,
    )


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Return the F1 of ROUGE-L as rouge-score computes it, without stemming; the corpus score is the mean.

    Raises:
        ShapeError: there are no sentences, or not one reference for each hypothesis.

    Source: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.
    """
    _check_sizes(hypotheses, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    sentences = np.array(
        [100 * scorer.score(r, h)["rougeL"].fmeasure for h, r in zip(hypotheses, references, strict=True)],
        dtype=np.float64,
    )
    statistics = np.stack([sentences, np.ones_like(sentences)], axis=1)
    return Scores("ROUGE-L", float(sentences.mean()), sentences, statistics, _mean_of_sums)


def paired_bootstrap(before: Scores, after: Scores, *, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Compare two systems by resampling sentences with replacement, the same ones for both.

    The p-value is for the claim that ``after`` is *not* better: ``(1 + c) / (1 + resamples)``, with c the
    number of resamples whose corpus score of ``after`` is at most that of ``before``. It is one-sided and
    never zero; for two systems with equal answers it is 1.

    Args:
        before, after: scores of two systems by one metric on the same n sentences.
        seed: of ``numpy.random.default_rng``.
        resamples: at least 1.

    Raises:
        ShapeError: the metrics or the numbers of sentences differ, or ``resamples`` is below 1.

    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation"; the added one
    after Davison and Hinkley 1997, section 4.2.5.
    """
    if before.metric != after.metric or before.statistics.shape != after.statistics.shape or resamples < 1:
        raise ShapeError(
            "paired_bootstrap: expected one metric, one set of sentences and at least 1 resample, got "
            f"{before.metric} {before.statistics.shape}, {after.metric} {after.statistics.shape} and "
            f"{resamples}; "
            "score both systems on the same sentences"
        )
    generator = np.random.default_rng(seed)
    n = len(before.statistics)
    differences = np.empty(resamples)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        stop = min(start + _RESAMPLES_AT_ONCE, resamples)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=stop - start).astype(np.float64)
        old, new = (system.aggregate(counts @ system.statistics) for system in (before, after))
        differences[start:stop] = new - old
    not_better = int(np.count_nonzero(differences <= 0))
    low, high = np.percentile(differences, [2.5, 97.5])
    p_value = (1 + not_better) / (1 + resamples)
    return Comparison(before.corpus, after.corpus, float(low), float(high), p_value, resamples, seed)


def _check_sizes(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        raise ShapeError(
            f"scores: expected as many hypotheses as references and at least 1, got {len(hypotheses)} and "
            f"{len(references)}; score one answer for each reference"
        )


def _chrf_of_sums(sums: Array) -> Array:
    """Return chrF of (m, 18) sums: for each of six orders the n-grams of hypothesis, reference, and both."""
    in_hypothesis, in_reference, in_both = sums.reshape(len(sums), -1, 3).transpose(2, 0, 1)
    used = (in_hypothesis > 0) & (in_reference > 0)
    orders = np.maximum(used.sum(axis=1), 1)
    precision = np.divide(in_both, in_hypothesis, where=used, out=np.zeros_like(in_both)).sum(axis=1) / orders
    recall = np.divide(in_both, in_reference, where=used, out=np.zeros_like(in_both)).sum(axis=1) / orders
    weighted: Array = _BETA**2 * precision + recall
    score = np.zeros_like(weighted)
    np.divide(100 * (1 + _BETA**2) * precision * recall, weighted, where=weighted > 0, out=score)
    return score


def _mean_of_sums(sums: Array) -> Array:
    return np.asarray(sums[:, 0] / sums[:, 1], dtype=np.float64)
