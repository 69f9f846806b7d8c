"""Embeddings that are one tensor: which of a checkpoint's tensors are meant, and one update of them all."""

from collections.abc import Iterable

import numpy as np

from .base_tensors import BaseTensors
from .checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, is_module
from .lora_pair import LoraPair

SHARED = ("shared",)
"""What encoder and decoder of T5 and BART call the embedding of both, whatever the output layer is."""

EMBEDDINGS = (*INPUT_EMBEDDINGS, *SHARED, *OUTPUT_EMBEDDINGS)


def tied_tensors(base: BaseTensors, name: str) -> tuple[str, ...]:
    """Return the base's names of the one tensor that ``name`` is among other things; none for a tensor of
    its own."""
    if not is_module(name, EMBEDDINGS):
        return ()
    if base.tied:
        return tuple(other for other in base.names if is_module(other, EMBEDDINGS))
    inputs = (*INPUT_EMBEDDINGS, *SHARED)
    if is_module(name, inputs) and any(is_module(other, SHARED) for other in base.names):
        return tuple(other for other in base.names if is_module(other, inputs))
    return ()


def tied_twin(name: str, names: Iterable[str], *, tied: bool) -> str | None:
    """Return the embedding among ``names`` that one called ``name`` shares its tensor with; None where
    embeddings are not ``tied``, or ``name`` is of none."""
    if not tied or not is_module(name, EMBEDDINGS):
        return None
    return next((other for other in names if other != name and is_module(other, EMBEDDINGS)), None)


def same_update(one: LoraPair, other: LoraPair) -> bool:
    """Tell whether two pairs of embeddings and output layers are one update of one weight (V, d)."""
    return one.scaling == other.scaling and all(
        np.array_equal(left, right) for left, right in zip(_as_linear(one), _as_linear(other), strict=True)
    )


def _as_linear(pair: LoraPair) -> tuple[np.ndarray, np.ndarray]:
    """Return A (r, d) and B (V, r)."""
    return (pair.B.T, pair.A.T) if pair.kind == "embedding" else (pair.A, pair.B)
