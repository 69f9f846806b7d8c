"""What the singular values and vectors of an adapter's updates say: of its ranks, and beside W0."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import (
    ShapeError,
    TargetError,
    delta_svd,
    effective_rank,
    rank_for_energy,
    stable_rank,
    subspace_similarity_grid,
)

from .adapter import Adapter
from .adapter_ranks import with_ranks
from .pair_matrices import PairMatrices, matrices_of
from .rank_choice import RankPattern, unnamed_parameters
from .update_weights import UpdateWeights

Progress = Callable[[int, int], None]
"""Called with the layers that are done, and all."""

_BLOCK_ENTRIES = 1 << 22  # of W0 that are widened at a time
_NOISE = 2.0**-52  # times the larger side, the share of an update's size below which a singular value is 0


@dataclass(frozen=True, eq=False)
class LayerRanks:
    """What one update, ``delta = scaling * B @ A``, needs; of stacked experts, one of them.

    Attributes:
        name: the module's path, and the number of the expert.
        kind: as `LoraPair` has it.
        shape: of delta, (out, in); a convolution's taps count as columns.
        r: the rank of the factors.
        scaling: of the pair.
        singular_values: of delta, nonincreasing.
        effective_rank, stable_rank: see the functions of these names in `loracle.reference`.
        rank_for_energy: the smallest rank that keeps the share asked for; 0 where delta is zero.
        amplification: ``||delta||_F / ||U^T W0 V||_F``, U and V the singular vectors of delta; None without a
            base, or where delta is zero or W0 has nothing there.
        similarity_A, similarity_B: phi(i, j) of the row spaces of lora_A of this adapter and the other, and
            of the column spaces of lora_B; None without another adapter.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    r: int
    scaling: float
    singular_values: NDArray[Any]
    effective_rank: float
    stable_rank: float
    rank_for_energy: int
    amplification: float | None = None
    similarity_A: NDArray[Any] | None = None  # noqa: N815
    similarity_B: NDArray[Any] | None = None  # noqa: N815

    @property
    def frobenius(self) -> float:
        """``||delta||_F``."""
        return math.hypot(*self.singular_values.tolist())


@dataclass(frozen=True, eq=False)
class RankAnalysis:
    """All updates of an adapter, and the ranks that they need.

    Attributes:
        layers: in the adapter's order.
        energy: the share that ``proposal`` keeps of each update's squared Frobenius norm.
        proposal: ``r`` and ``rank_pattern`` of an adapter with the smallest such ranks, of at least 1.
        parameters, proposed_parameters: the entries of the factors as they are, and with those ranks.
    """

    layers: tuple[LayerRanks, ...]
    energy: float
    proposal: RankPattern
    parameters: int
    proposed_parameters: int


def analyse(
    adapter: Adapter,
    *,
    energy: float = 0.99,
    weights: UpdateWeights | None = None,
    other: Adapter | None = None,
    progress: Progress | None = None,
) -> RankAnalysis:
    """Return what each update of an adapter needs.

    No update is formed: see `loracle.reference.delta_svd`. With DoRA the update is the one before rows are
    rescaled.

    Args:
        adapter: as `read_adapter` returns it.
        energy: a share above 0 and at most 1.
        weights: of the base, for the amplification.
        other: another adapter of the same layers, for the similarity: of another rank, or another seed.
        progress: called after each layer.

    Raises:
        ConfigError: ``energy`` is out of range, or a stacked parameter has no name: see `matrices_of`.
        TargetError: the other adapter has none of the layers.
        ShapeError: a layer has another width there.
    """
    beside = {} if other is None else _by_name(other)
    own = _by_name(adapter)
    if other is not None and not beside.keys() & own.keys():
        raise TargetError(
            f"the other adapter: expected a layer of this one, such as {next(iter(own))}, got none, but "
            f"{next(iter(beside))}; are both of one model?"
        )
    layers: list[LayerRanks] = []
    needed: dict[str, int] = {}
    for path, pair in adapter.pairs.items():
        for number, matrices in enumerate(matrices_of(adapter, path)):
            W0 = None if weights is None else weights.matrix(path, number)
            layer = _layer(matrices, pair.kind, energy, W0, beside.get(matrices.name))
            layers.append(layer)
            needed[path] = max(needed.get(path, 1), layer.rank_for_energy)
            if progress is not None:
                progress(len(layers), len(own))
        if weights is not None:
            weights.release(path)
    return RankAnalysis(tuple(layers), energy, *_proposal(adapter, needed))


def _by_name(adapter: Adapter) -> dict[str, PairMatrices]:
    return {own.name: own for path in adapter.pairs for own in matrices_of(adapter, path)}


def _proposal(adapter: Adapter, needed: Mapping[str, int]) -> tuple[RankPattern, int, int]:
    """Return the pattern, and the entries of all factors before and after."""
    unnamed = unnamed_parameters(adapter)
    ranks = {**needed, **dict.fromkeys(unnamed, max((needed[path] for path in unnamed), default=1))}
    config = with_ranks(adapter.config, ranks, dict.fromkeys(ranks, 1.0), next(iter(unnamed), None))
    before = after = 0
    for path, r in ranks.items():
        for own in matrices_of(adapter, path):
            before += own.A.size + own.B.size
            after += r * (own.A.shape[1] + own.B.shape[0])
    return RankPattern(dict(config.rank_pattern), config.r), before, after


def _layer(
    own: PairMatrices, kind: str, energy: float, W0: NDArray[Any] | None, other: PairMatrices | None
) -> LayerRanks:
    U, s, Vh = delta_svd(own.A, own.B, own.scaling)
    return LayerRanks(
        name=own.name,
        kind=kind,
        shape=(own.B.shape[0], own.A.shape[1]),
        r=own.r,
        scaling=own.scaling,
        singular_values=s,
        effective_rank=effective_rank(s),
        stable_rank=stable_rank(s),
        rank_for_energy=rank_for_energy(s, energy),
        amplification=None if W0 is None else _amplification(own, U, s, Vh, W0),
        similarity_A=None if other is None else _similarity(own.name, "lora_A", own.A, other.A),
        similarity_B=None if other is None else _similarity(own.name, "lora_B", own.B.T, other.B.T),
    )


def _amplification(
    own: PairMatrices, U: NDArray[Any], s: NDArray[Any], Vh: NDArray[Any], W0: NDArray[Any]
) -> float | None:
    """Return `loracle.reference.amplification_factor`, W0 widened to float64 a few rows at a time."""
    size = abs(own.scaling) * float(
        np.linalg.norm(own.A.astype(np.float64)) * np.linalg.norm(own.B.astype(np.float64))
    )
    known = int((s > max(len(U), Vh.shape[1]) * _NOISE * size).sum())
    projected = np.zeros((known, known))
    step = max(1, _BLOCK_ENTRIES // W0.shape[1])
    for start in range(0, len(W0), step):
        rows = W0[start : start + step].astype(np.float64)
        projected += U[start : start + step, :known].T @ (rows @ Vh[:known].T)
    found = float(np.linalg.norm(projected))
    return float(np.linalg.norm(s)) / found if found else None


def _similarity(name: str, part: str, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    if one.shape[1] != other.shape[1]:
        raise ShapeError(
            f"{name}: {part}: expected width {one.shape[1]} as this adapter has, got {other.shape[1]}; "
            "are both of one model?"
        )
    return subspace_similarity_grid(one, other)
