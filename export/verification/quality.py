"""How far a model's answers are from the truth: measured, where no bound says how far they may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quality:
    """The loss of a quantised model, over all rows of its outputs: positions of texts, or whole inputs.

    Attributes:
        rows: how many.
        rms_error: root of the mean square of `output - truth` over all entries.
        largest_error: of an entry.
        kl_divergence: mean over the rows of `sum_t p[t] log(p[t] / q[t])`, in nats, where p is the softmax of
            the truth and q that of the output; None where the outputs are no logits.
        agreement: share of the rows whose largest entry is the truth's; None as before.

    All but `rows` are NaN where an output is no finite number.
    """

    rows: int
    rms_error: float
    largest_error: float
    kl_divergence: float | None
    agreement: float | None

    @property
    def finite(self) -> bool:
        """Whether every output is a finite number."""
        return math.isfinite(self.rms_error)

    def to_json(self) -> dict[str, float | None]:
        """All of them, by their names; None for what is no number."""
        return {
            name: None if value is None or not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        text = f"RMS error {self.rms_error:.3g}, largest {self.largest_error:.3g}"
        if self.kl_divergence is not None and self.agreement is not None:
            text += (
                f", KL divergence {self.kl_divergence:.3g} nats, most likely answer the same "
                f"in {100 * self.agreement:.1f}%"
            )
        return f"{text} of {self.rows} rows" if self.agreement is not None else f"{text}, {self.rows} rows"


def measure_quality(pairs: Iterable[tuple[Array, Array]], *, logits: bool = True) -> Quality:
    """Compare outputs with their truth.

    Args:
        pairs: (output, truth), both of shape (..., entries of a row).
        logits: whether the softmax of a row is a distribution.
    """
    rows = entries = agreed = 0
    squares = divergence = largest = 0.0
    finite = True
    for output, truth in pairs:
        got, expected = (array.reshape(-1, truth.shape[-1]).astype(np.float64) for array in (output, truth))
        rows += len(got)
        entries += got.size
        finite = finite and bool(np.isfinite(got).all())
        if not finite or not got.size:
            continue
        error = np.abs(got - expected)
        squares += float(np.square(error).sum())
        largest = max(largest, float(error.max()))
        if logits:
            divergence += float(_divergences(expected, got).sum())
            agreed += int(np.count_nonzero(got.argmax(-1) == expected.argmax(-1)))
    if not finite or not entries:
        unknown = math.nan if logits else None
        return Quality(rows, math.nan, math.nan, unknown, unknown)
    rms = math.sqrt(squares / entries)
    return Quality(
        rows, rms, largest, divergence / rows if logits else None, agreed / rows if logits else None
    )


def _divergences(truth: Array, logits: Array) -> Array:
    """`sum_t p[t] log(p[t] / q[t])` of each row, p and q the softmax of `truth` and `logits`."""
    p, q = _log_softmax(truth), _log_softmax(logits)
    divergences: Array = (np.exp(p) * (p - q)).sum(-1)
    return divergences


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
