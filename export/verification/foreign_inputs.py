"""What each input and output of somebody's graph is for, told from its name, its type and its axes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import FileError

_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_INTEGERS = "iu"


class Role(StrEnum):
    """What an input that is no cache is for."""

    TOKENS = "tokens"
    MASK = "mask"
    POSITIONS = "positions"
    SEGMENTS = "segments of the tokens"
    PIXELS = "pixels"
    KEPT_LOGITS = "number of last positions with logits, 0 for all"
    PAST_LENGTH = "number of cached tokens"
    TOTAL_LENGTH = "number of cached tokens and given ones"
    HAS_PAST = "whether something is cached"
    CACHE_POSITIONS = "positions in the cache"


@dataclass(frozen=True)
class _Sign:
    """What an input of a role looks like: part of its name, its numbers of axes, its kinds of numbers."""

    role: Role
    name: str
    ranks: tuple[int, ...]
    kinds: str = _INTEGERS


# The first that fits counts.
_SIGNS = (
    _Sign(Role.KEPT_LOGITS, r"logits_to_keep", (0, 1)),
    _Sign(Role.HAS_PAST, r"use_cache", (0, 1), "b"),
    _Sign(Role.CACHE_POSITIONS, r"cache_position", (1,)),
    _Sign(Role.POSITIONS, r"position", (1, 2)),
    _Sign(Role.PAST_LENGTH, r"past.*len", (0, 1)),
    _Sign(Role.TOTAL_LENGTH, r"total.*len", (0, 1)),
    _Sign(Role.SEGMENTS, r"token_type|segment", (2,)),
    _Sign(Role.MASK, r"^(attention_?)?mask(\.\d+)?$", (2,), "iubf"),
    _Sign(Role.TOKENS, r"^(input_ids|inputs?|tokens|ids)(\.\d+)?$", (2,)),
    _Sign(Role.PIXELS, r"pixel", (4,), "f"),
)
_CACHE = re.compile(r"past|cache|key|value|kv")
# What is made for a graph that demands a size must fit into memory, whatever it demands.
_LONGEST_AXIS = 2**16
_MOST_ENTRIES = 2**24
_MOST_TOKENS = 2**14


@dataclass(frozen=True)
class Entry:
    """An input or output of a graph.

    Attributes:
        axes: of each its length where it is fixed; the symbol that stands for it, or None, elsewhere.
    """

    name: str
    dtype: np.dtype[Any]
    axes: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Cached:
    """One tensor of a cache that grows.

    Attributes:
        past: the input.
        present: name of the output that is the next step's past.
        empty: shape of a row before anything is cached.
    """

    past: Entry
    present: str
    empty: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """How a graph is called.

    Attributes:
        graph: its file.
        inputs: those that are no cache, by their roles.
        cache: of a decoder with one; empty for other models.
        outputs: the graph's names of the outputs that were asked for.
        rows: how many texts or images a call takes; None for any number.
        width: how many tokens each of them has; None for any number.
    """

    graph: Path
    inputs: Mapping[Role, Entry]
    cache: tuple[Cached, ...]
    outputs: tuple[str, ...]
    rows: int | None
    width: int | None


def read_interface(
    session: onnxruntime.InferenceSession, graph: Path, outputs: Sequence[str], config: Mapping[str, Any]
) -> Interface:
    """How to call a graph that anybody has exported.

    Args:
        session: on the graph.
        graph: its file, for messages.
        outputs: what is wanted of it, by Optimum's names; a single one may have another name.
        config: the content of the model's `config.json`, for the sizes of a cache that the graph leaves open.

    Raises FileError: an input is needed that is not understood, or an output is missing.
    """
    known, cache = _by_role(graph, [_entry(graph, node) for node in session.get_inputs()])
    named = [str(node.name) for node in session.get_outputs()]
    main = known.get(Role.TOKENS) or known.get(Role.PIXELS)
    if main is None or (Role.PIXELS in known and len(known) > 1):
        raise FileError(
            f"{graph}: expected inputs of a text (input_ids and what belongs to it), or pixels alone, found "
            f"{', '.join(entry.name for entry in known.values()) or 'neither'}"
        )
    wanted = _outputs(graph, named, outputs)
    presents = [name for name in named if name not in wanted]
    batch = main.axes[0]
    pairs = _pairs(graph, [entry.name for entry in cache], presents) if cache else {}
    return Interface(
        graph,
        known,
        tuple(Cached(entry, pairs[entry.name], _empty(graph, entry, batch, config)) for entry in cache),
        wanted,
        batch if isinstance(batch, int) else None,
        main.axes[1] if Role.TOKENS in known and isinstance(main.axes[1], int) else None,
    )


def _entry(graph: Path, node: onnxruntime.NodeArg) -> Entry:
    dtype = _TYPES.get(node.type)
    if dtype is None:
        raise FileError(f"{graph}: {node.name}: expected an input of {', '.join(_TYPES)}, got {node.type}")
    entry = Entry(str(node.name), dtype, tuple(node.shape))
    fixed = [length for length in entry.axes if isinstance(length, int)]
    most = _MOST_TOKENS if dtype.kind in _INTEGERS else _MOST_ENTRIES
    if not all(0 < length <= _LONGEST_AXIS for length in fixed) or math.prod(fixed) > most:
        raise FileError(
            f"{graph}: {entry.name}: expected an input of at most {most} entries, got {list(entry.axes)}; "
            "export the model with open axes"
        )
    return entry


def _by_role(graph: Path, entries: Sequence[Entry]) -> tuple[dict[Role, Entry], list[Entry]]:
    """The inputs by role, and those of the cache."""
    known: dict[Role, Entry] = {}
    cache: list[Entry] = []
    unknown: list[Entry] = []
    for entry in entries:
        role = _role(entry)
        if role is not None and role not in known:
            known[role] = entry
        elif role is None and entry.dtype.kind == "f" and len(entry.axes) > 2 and _CACHE.search(entry.name):
            cache.append(entry)
        else:
            unknown.append(entry)
    if len(unknown) == 1 and not {Role.TOKENS, Role.PIXELS} & known.keys() and _is_text(unknown[0]):
        known[Role.TOKENS] = unknown.pop()
    if unknown:
        first = unknown[0]
        raise FileError(
            f"{graph}: {first.name}: expected inputs for tokens, their mask, positions and segments, pixels, "
            f"or a cache, found {first.dtype} {list(first.axes)}, which is not understood; export the model "
            "without it"
        )
    return known, cache


def _role(entry: Entry) -> Role | None:
    name, rank, kind = entry.name.lower(), len(entry.axes), entry.dtype.kind
    for sign in _SIGNS:
        if rank in sign.ranks and kind in sign.kinds and re.search(sign.name, name):
            return sign.role
    return None


def _is_text(entry: Entry) -> bool:
    return len(entry.axes) == 2 and entry.dtype.kind in _INTEGERS


def _outputs(graph: Path, named: Sequence[str], outputs: Sequence[str]) -> tuple[str, ...]:
    missing = [name for name in outputs if name not in named]
    if not missing:
        return tuple(outputs)
    if len(outputs) == 1:
        # Beside a cache's the only one, or the first, as transformers returns them.
        own = [name for name in named if not _CACHE.search(name) and "present" not in name]
        if len(own) == 1 or (own and own[0] == named[0]):
            return (own[0],)
    raise FileError(f"{graph}: {missing[0]}: expected among the outputs, found {', '.join(named)}")


def _pairs(graph: Path, pasts: Sequence[str], presents: Sequence[str]) -> dict[str, str]:
    """For each input of a cache the output that follows it: of the same layer, or else in the same order."""
    ours, theirs = ({_place(name): name for name in names} for names in (pasts, presents))
    if len(ours) == len(pasts) and ours.keys() <= theirs.keys() and len(theirs) == len(presents):
        return {name: theirs[place] for place, name in ours.items()}
    if len(pasts) != len(presents):
        raise FileError(
            f"{graph}: {pasts[0]}: expected an output for each of the cache's {len(pasts)} inputs, found "
            f"{len(presents)} outputs"
        )
    return dict(zip(pasts, presents, strict=True))


def _place(name: str) -> tuple[tuple[int, ...], str]:
    """The numbers in a name, of which one is the layer's, and whether it is of keys or of values."""
    own = name.lower().replace("key_values", "")
    kind = next((kind for kind in ("value", "key") if kind in own), "")
    return tuple(map(int, re.findall(r"\d+", own))), kind


def _empty(graph: Path, entry: Entry, batch: int | str | None, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a row's cache with nothing in it.

    One open axis is the batch's; of the others one is that of the tokens. Where there are more, in a cache of
    four axes, they are (batch, heads, tokens, width), whose sizes the configuration tells.
    """
    opened = [axis for axis, length in enumerate(entry.axes) if not isinstance(length, int)]
    rows = [axis for axis in opened if batch is not None and entry.axes[axis] == batch]
    if not rows and len(opened) > 1 and not isinstance(batch, int):
        rows = [0]
    tokens = [axis for axis in opened if axis not in rows]
    sizes: dict[int, int] = dict.fromkeys(rows, 1)
    if len(tokens) > 1 and len(entry.axes) == 4 and 2 in tokens:
        sizes |= {axis: size for axis, size in _cache_sizes(config).items() if axis in tokens}
        tokens = [axis for axis in tokens if axis not in sizes]
    if len(tokens) != 1:
        raise FileError(
            f"{graph}: {entry.name}: expected a cache that grows along one axis, found {list(entry.axes)}; "
            "export the model with a dynamic cache, or with none"
        )
    sizes[tokens[0]] = 0
    return tuple(
        sizes.get(axis, length if isinstance(length, int) else 1) for axis, length in enumerate(entry.axes)
    )


def _cache_sizes(config: Mapping[str, Any]) -> dict[int, int]:
    """Heads and width of a cache (batch, heads, tokens, width), by axis, as far as they are known."""

    def first(*keys: str) -> int | None:
        return next((config[key] for key in keys if type(config.get(key)) is int), None)

    heads = first("num_attention_heads", "n_head")
    hidden = first("hidden_size", "n_embd")
    width = first("head_dim") or (hidden // heads if hidden and heads else None)
    found = {1: first("num_key_value_heads") or heads, 3: width}
    return {axis: size for axis, size in found.items() if size is not None}
