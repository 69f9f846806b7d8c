"""Table 1 of arXiv 2106.09685: milliseconds of a forward pass of GPT-2 medium on an RTX 8000, 100 trials."""

from __future__ import annotations

from collections.abc import Mapping

from .methods import ADAPTER_H, ADAPTER_L, FULL, MERGED

MODEL = "gpt2-medium"
PARAMETERS = 354_823_168
"""Of the model."""

SETTINGS: Mapping[tuple[int, int], float] = {(32, 512): 0.52e6, (16, 256): 11.07e6, (1, 128): 11.07e6}
"""Batch and length to the parameters of an adapter. The nearest ranks are the paper's: 9 and 224 of AdapterL,
0.52M and 11.09M; 5 and 112 of AdapterH, 0.54M and 11.06M."""

MILLISECONDS: Mapping[tuple[int, int], Mapping[str, float]] = {
    (32, 512): {FULL: 1449.4, MERGED: 1449.4, ADAPTER_L: 1482.0, ADAPTER_H: 1492.2},
    (16, 256): {FULL: 338.0, MERGED: 338.0, ADAPTER_L: 354.8, ADAPTER_H: 366.3},
    (1, 128): {FULL: 19.8, MERGED: 19.8, ADAPTER_L: 23.9, ADAPTER_H: 25.8},
}


def paper_ratio(batch: int, length: int, method: str) -> float | None:
    """The paper's time of a method over that of full fine-tuning; None where it has none."""
    row = MILLISECONDS.get((batch, length), {})
    return row[method] / row[FULL] if method in row else None
