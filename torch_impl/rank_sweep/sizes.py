"""How many numbers the adapters of a target set have, and the ranks that they can have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loracle.files import LoraConfig
from loracle.reference import ConfigError

from ..adapter_io import adapter_of
from ..inject import eject, inject
from .target_sets import target_modules


@dataclass(frozen=True)
class TargetSet:
    """A target set in a model.

    Attributes:
        name: as it was asked for.
        modules: ``target_modules``, as a configuration has it.
        layers: how many are adapted.
        per_rank: numbers of A and B together at rank 1; at rank r they are r times as many.
        largest: the smallest dimension of an adapted weight, above which a rank adds nothing.
        narrowest: the path of that weight.
    """

    name: str
    modules: tuple[str, ...] | str
    layers: int
    per_rank: int
    largest: int
    narrowest: str


def measure_set(model: Any, name: str) -> TargetSet:
    """Return what a set comes to in a model, which is left as it was, but frozen.

    Raises:
        TargetError, ConfigError: the set has no layer, or one that can't be adapted; see `inject`.
    """
    modules = target_modules(model, name)
    config = LoraConfig(r=1, lora_alpha=1.0, target_modules=modules)
    inject(model, config, generator=torch.Generator().manual_seed(0))
    pairs = adapter_of(model).pairs
    eject(model)
    # At rank 1 the sizes of the two are the dimensions; a convolution's is that of a tap for each channel.
    sides = {path: min(pair.A.size, pair.B.size) for path, pair in pairs.items()}
    narrowest = min(sides, key=lambda path: sides[path])
    per_rank = sum(pair.A.size + pair.B.size for pair in pairs.values())
    return TargetSet(name, modules, len(pairs), per_rank, sides[narrowest], narrowest)


def check_rank(one: TargetSet, rank: int) -> None:
    """Refuse a rank above a dimension of an adapted weight.

    Raises:
        ConfigError: it is.
    """
    if rank > one.largest:
        raise ConfigError(
            f"ranks: expected at most {one.largest}, the smaller dimension of {one.narrowest}, for targets "
            f"{one.name!r}, got {rank}; leave it or the set out"
        )


def rank_of_equal_size(first: TargetSet, other: TargetSet, rank: int) -> int:
    """Return the largest rank at which ``other`` has no more numbers than ``first`` at ``rank``.

    Raises:
        ConfigError: there is none.
    """
    found = rank * first.per_rank // other.per_rank
    if found < 1:
        least = -(-other.per_rank // first.per_rank)
        raise ConfigError(
            f"constant_parameters: expected ranks of {first.name!r} of at least {least}, with whose "
            f"parameters {other.name!r} can have rank 1, got {rank}; leave it or the set out"
        )
    return found


def ranks_of(sets: Sequence[TargetSet], ranks: Sequence[int], constant: bool) -> dict[tuple[str, int], int]:
    """Return, by a set's name and a column's rank, the rank that is trained.

    Raises:
        ConfigError: one is above a dimension or, where parameters are ``constant``, below 1.
    """
    found = {}
    for one in sets:
        for rank in ranks:
            found[one.name, rank] = rank_of_equal_size(sets[0], one, rank) if constant else rank
            check_rank(one, found[one.name, rank])
    return found
