"""An adapter of smaller ranks: of each update the part with the largest singular values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loracle.reference import delta_singular_values, delta_svd

from .adapter import Adapter
from .adapter_ranks import alpha_for, with_ranks
from .lora_pair import LoraPair
from .pair_matrices import PairMatrices, joined, matrices_of, split
from .rank_choice import check_ranks, unnamed_parameters
from .ties import same_update

Progress = Callable[[int, int], None]
"""Called with the pairs that are done, and all."""


@dataclass(frozen=True)
class TruncatedLayer:
    """What became of one update, ``delta = scaling * B @ A``; of stacked experts, of one of them.

    The residuals are those of the factors as they are written, with the roundings to their dtype.

    Attributes:
        name: the module's path, and the number of the expert.
        r_before, r: the rank of the pair, and of the truncated one.
        frobenius: ``||delta||_F``.
        frobenius_residual: ``||delta - truncated||_F``.
        relative_residual: that over ``||delta||_F``; 0 where delta is 0.
        spectral_residual: ``||delta - truncated||_2``.
    """

    name: str
    r_before: int
    r: int
    frobenius: float
    frobenius_residual: float
    relative_residual: float
    spectral_residual: float


@dataclass(frozen=True, eq=False)
class Truncation:
    """The truncated adapter, and what of each update is not in it."""

    adapter: Adapter
    layers: tuple[TruncatedLayer, ...]


def truncate(adapter: Adapter, ranks: Mapping[str, int], progress: Progress | None = None) -> Truncation:
    """Return the adapter with other ranks, each update the nearest of its rank to what it was.

    No product of the factors is formed: the singular vectors come from their QR factorizations, see
    `loracle.reference.delta_svd`. A pair that keeps its rank keeps its bits. Scalings are kept, as alpha / r.
    Biases, magnitudes of DoRA and whole tensors stay as they are: with DoRA it is the update before its rows
    are rescaled that is truncated. An output layer with the update of the embedding that it is tied to still
    has the same one afterwards.

    Args:
        adapter: of linear layers, embeddings, convolutions (each kernel's taps are columns of the update) and
            stacked experts, whose updates are truncated one by one.
        ranks: path of each pair to its rank, from 1 to the pair's own; see `rank_choice`.
        progress: called after each pair.

    Raises:
        ConfigError: a rank is out of range, or cannot be said of a stacked parameter without its name.
        NonFiniteError: an update is too large for float64.
    """
    check_ranks(adapter, ranks)
    scalings = {
        path: alpha_for(pair.scaling, ranks[path]) / ranks[path] for path, pair in adapter.pairs.items()
    }
    pairs: dict[str, LoraPair] = {}
    layers: list[TruncatedLayer] = []
    for done, (path, pair) in enumerate(adapter.pairs.items(), 1):
        before = matrices_of(adapter, path)
        r, scaling = ranks[path], scalings[path]
        tied = _truncated_twin(adapter, path, pairs)
        if tied is not None:
            pairs[path] = replace(tied, kind=pair.kind)
        elif r == before[0].r:
            pairs[path] = joined(pair, [replace(own, scaling=scaling) for own in before])
        else:
            pairs[path] = joined(pair, [_truncated(own, r, scaling) for own in before])
        after = split(path, pairs[path], len(before))
        layers += [_compared(*both) for both in zip(before, after, strict=True)]
        if progress is not None:
            progress(done, len(adapter.pairs))
    unnamed = next(iter(unnamed_parameters(adapter)), None)
    config = with_ranks(adapter.config, ranks, scalings, unnamed)
    return Truncation(replace(adapter, config=config, pairs=pairs), tuple(layers))


def _truncated(own: PairMatrices, r: int, scaling: float) -> PairMatrices:
    """Return the nearest update of rank r; column k of B and row k of A get the same norm."""
    if scaling == 0:
        return PairMatrices(own.name, own.A[:r], own.B[:, :r], scaling)
    U, s, Vh = delta_svd(own.A, own.B, own.scaling)
    known = min(r, len(s))
    root = np.sqrt(s[:known] / abs(scaling))
    A, B = np.zeros((r, own.A.shape[1])), np.zeros((own.B.shape[0], r))
    A[:known] = root[:, None] * Vh[:known]
    B[:, :known] = U[:, :known] * math.copysign(1.0, scaling) * root
    return PairMatrices(own.name, A, B, scaling)


def _truncated_twin(adapter: Adapter, path: str, done: Mapping[str, LoraPair]) -> LoraPair | None:
    """Return what an embedding's pair became, turned, where this is an output layer's with the same update,
    or the other way round; None elsewhere."""
    pair = adapter.pairs[path]
    if not adapter.config.ensure_weight_tying or pair.kind not in ("linear", "embedding"):
        return None
    for other, new in done.items():
        old = adapter.pairs[other]
        if {old.kind, pair.kind} == {"linear", "embedding"} and same_update(old, pair):
            return replace(new, A=np.ascontiguousarray(new.B.T), B=np.ascontiguousarray(new.A.T))
    return None


def _compared(before: PairMatrices, after: PairMatrices) -> TruncatedLayer:
    """Return what the written factors leave out, from the singular values of the difference."""
    size = math.hypot(*_singular_values([before]))
    if before.r == after.r and before.scaling == after.scaling:
        return TruncatedLayer(before.name, before.r, after.r, size, 0.0, 0.0, 0.0)
    left_out = _singular_values([before, replace(after, scaling=-after.scaling)])
    residual = math.hypot(*left_out)
    return TruncatedLayer(
        before.name, before.r, after.r, size, residual, residual / size if size else 0.0, left_out[0]
    )


def _singular_values(updates: Sequence[PairMatrices]) -> list[float]:
    """Return the singular values of a sum of updates, which is one of all their rows and columns."""
    A = np.concatenate([own.A.astype(np.float64) for own in updates])
    B = np.concatenate([own.B.astype(np.float64) * own.scaling for own in updates], axis=1)
    values: list[float] = delta_singular_values(A, B).tolist()
    return values
