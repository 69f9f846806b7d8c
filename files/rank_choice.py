"""Which rank each pair of an adapter is to have: one for all, by energy, or by a pattern."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.reference import ConfigError, FileError, delta_singular_values, rank_for_energy

from .adapter import Adapter
from .config_checks import short
from .json_file import read_json_object
from .matching import pattern_value
from .pair_matrices import matrices_of

PATTERN_KEY = "rank_pattern"


@dataclass(frozen=True)
class RankPattern:
    """Expressions for the ends of paths, each with its rank, as ``rank_pattern`` has them, and ``r`` for the
    other paths, or None."""

    keys: Mapping[str, Any]
    r: Any = None


def ranks_for_rank(adapter: Adapter, r: int) -> dict[str, int]:
    """Return ``r`` for each pair, and its own rank for one that has less.

    Raises:
        ConfigError: ``r`` is below 1, or no pair has more.
    """
    own = own_ranks(adapter)
    most = max(own.values())
    if not 1 <= r < most:
        allowed = f"1 to {most - 1}, below" if most > 1 else "none, as no rank is below"
        raise ConfigError(f"rank: expected {allowed} the adapter's {most}, got {r}; choose another")
    return {path: min(r, rank) for path, rank in own.items()}


def ranks_for_energy(adapter: Adapter, energy: float) -> dict[str, int]:
    """Return the smallest rank of each pair that keeps this share of its update's squared Frobenius norm.

    Experts that are stacked have one rank, the largest that one of them needs; so have all stacked parameters
    whose names are not in the file. No rank is below 1.

    Raises:
        ConfigError: ``energy`` is not above 0 and at most 1; or see `matrices_of`.
    """
    found = {
        path: max(
            max(1, rank_for_energy(delta_singular_values(own.A, own.B, own.scaling), energy))
            for own in matrices_of(adapter, path)
        )
        for path in adapter.pairs
    }
    unnamed = unnamed_parameters(adapter)
    return {**found, **dict.fromkeys(unnamed, max((found[path] for path in unnamed), default=1))}


def ranks_for_pattern(adapter: Adapter, pattern: RankPattern) -> dict[str, int]:
    """Return the ranks that a pattern gives; without ``r`` a pair that no key matches keeps its own.

    Raises:
        ConfigError: a key matches no pair, or is no expression; a rank is no integer of at least 1, or above
            a pair's own.
    """
    own = own_ranks(adapter)
    for key, rank in pattern.keys.items():
        _check_rank(f"{PATTERN_KEY} {key!r}", rank)
        if all(pattern_value(path, {key: rank}, 0) == 0 for path in own):
            raise ConfigError(f"{PATTERN_KEY} {key!r}: matches no layer of the adapter; correct it")
    if pattern.r is not None:
        _check_rank("r", pattern.r)
    ranks = {
        path: pattern_value(path, pattern.keys, rank if pattern.r is None else pattern.r)
        for path, rank in own.items()
    }
    check_ranks(adapter, ranks)
    return ranks


def read_pattern(path: Path) -> RankPattern:
    """Return the pattern of a JSON file: an object of expressions and ranks, or one with the keys ``r`` and
    ``rank_pattern``, as in an ``adapter_config.json``, or with such a one under ``proposal``, as
    `loracle rank analyse --json` prints it.

    Raises:
        FileError: the file is missing or malformed, or has no pattern.
    """
    content = read_json_object(path)
    own = content.get("proposal", content)
    found = RankPattern(own)
    if isinstance(own, dict) and PATTERN_KEY in own:
        found = RankPattern(own[PATTERN_KEY], own.get("r"))
    if not isinstance(found.keys, dict) or not (found.keys or found.r):
        raise FileError(
            f"{path}: expected an object of module patterns and ranks, or one under {PATTERN_KEY}, got "
            f"{short(found.keys)}; correct the file"
        )
    return found


def _check_rank(name: str, rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{name}: expected an integer of at least 1, got {short(rank)}; correct it")


def own_ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each pair; of stacked experts that of one. Raises: as `matrices_of`."""
    return {path: matrices_of(adapter, path)[0].r for path in adapter.pairs}


def unnamed_parameters(adapter: Adapter) -> tuple[str, ...]:
    """Return the paths of stacked parameters whose names are not known, as files lack them."""
    return tuple(
        path
        for path, pair in adapter.pairs.items()
        if pair.kind == "parameter" and not adapter.config.targets_parameter(path)
    )


def check_ranks(adapter: Adapter, ranks: Mapping[str, int]) -> None:
    """Check that each pair gets a rank that it can have.

    Raises:
        ConfigError: one is out of range; or stacked parameters without their names get several, or another
            scaling each, which no pattern could tell apart.
    """
    for path, rank in own_ranks(adapter).items():
        if not 1 <= ranks[path] <= rank:
            raise ConfigError(
                f"{path}: expected a rank from 1 to {rank}, which it has, got {ranks[path]}; choose another"
            )
    unnamed = {path: ranks[path] for path in unnamed_parameters(adapter)}
    if len(set(unnamed.values())) > 1:
        raise ConfigError(
            f"{', '.join(unnamed)}: stacked parameters without their names, which no rank_pattern can tell "
            f"apart; expected one rank for them, got {', '.join(map(str, unnamed.values()))}"
        )
