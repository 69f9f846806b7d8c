"""The weights of a mixture's experts: those of one expert are one weight each, whatever the checkpoint holds.

The experts' operator takes the weights of all experts as one tensor; adapters and checkpoints speak of one
expert's, or of all experts'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loracle.files.architectures import Architecture, Experts
from loracle.files.experts import own_names
from loracle.files.tensor_names import TensorNames
from loracle.files.updates import convert

from .matching import WeightSource
from .recipes import STACKED, STACKED_IN_TURN
from .template import GraphTemplate, Made

Array = np.ndarray[Any, Any]


def with_experts_apart(template: GraphTemplate, experts: Experts) -> GraphTemplate:
    """Return the template whose initializers of stacked experts are made of the weights of each.

    Args:
        template: the traced one, whose weights are the model's parameters.
        experts: of the architecture (`loracle.files.architectures`).
    """
    aliases: dict[str, tuple[str, ...]] = {}
    made, shapes = dict(template.made), dict(template.shapes)
    for weight, group in template.aliases.items():
        parts = experts.get(weight.rpartition(".")[2], ())
        own = own_names(weight, template.shape(weight)[0], experts) if parts else ()
        if not own:
            aliases[weight] = group
            continue
        _, rows, columns = template.shape(weight)
        made[weight] = Made(STACKED if len(parts) == 1 else STACKED_IN_TURN, own)
        shapes |= dict.fromkeys(own, (rows // len(parts), columns))
        aliases |= {name: (name,) for name in own}
    return replace(template, aliases=aliases, made=made, shapes=shapes)


def unstacked(templates: Sequence[GraphTemplate], source: WeightSource) -> WeightSource:
    """Return the weights with those of each expert apart, as the graphs have them; `source` if they are."""
    made = {
        name: own
        for template in templates
        for name, own in template.made.items()
        if own.recipe in (STACKED, STACKED_IN_TURN)
    }
    if not made:
        return source
    names = TensorNames(made, Architecture(templates[0].prefix, renames=templates[0].renames))
    slices: dict[str, _Slice] = {}
    for name in source.names:
        found = names.find(name)
        if found is not None and len(source.shape(name)) == _STACK_AXES:
            sources = made[found].sources
            parts = 1 if made[found].recipe == STACKED else 2
            slices |= {own: _Slice(name, *divmod(n, parts), parts) for n, own in enumerate(sources)}
    return _Unstacked(source, slices) if slices else source


_STACK_AXES = 3


@dataclass(frozen=True)
class _Slice:
    """One of `parts` weights of an expert in a stacked tensor."""

    name: str
    expert: int
    part: int
    parts: int

    def of(self, matrix: Array) -> Array:
        height = len(matrix) // self.parts
        return matrix[self.part * height : (self.part + 1) * height]


class _Unstacked:
    """A source whose stacked tensors are tensors of single experts, merged an expert at a time."""

    def __init__(self, source: WeightSource, slices: Mapping[str, _Slice]) -> None:
        self._source = source
        self._slices = slices
        apart: dict[str, list[str]] = {}
        for own, place in slices.items():
            apart.setdefault(place.name, []).append(own)
        self.names = tuple(own for name in source.names for own in apart.get(name, [name]))
        self.merged_names = tuple(own for name in source.merged_names for own in apart.get(name, [name]))
        self._held: tuple[tuple[str, int, Any], Array] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._slices.get(name)
        if place is None:
            return self._source.shape(name)
        _, rows, columns = self._source.shape(place.name)
        return (rows // place.parts, columns)

    def tensor(self, name: str, dtype: Any = None) -> Array:
        place = self._slices.get(name)
        if place is None:
            return self._source.tensor(name, dtype)
        # The parts of an expert are asked for one after the other, and merged at once.
        key = (place.name, place.expert, dtype)
        if self._held is None or self._held[0] != key:
            self._held = key, self._source.rows(place.name, place.expert, place.expert + 1, dtype)[0]
        return place.of(self._held[1])

    def rows(self, name: str, start: int, stop: int, dtype: Any = None) -> Array:
        if name in self._slices:
            return self.tensor(name, dtype)[start:stop]
        return self._source.rows(name, start, stop, dtype)

    def base_tensor(self, name: str, dtype: Any = None) -> Array | None:
        place = self._slices.get(name)
        if place is None:
            return self._source.base_tensor(name, dtype)
        base = self._source.base_tensor(place.name)
        if base is None:
            return None
        own = place.of(base[place.expert])
        return convert(own, own.dtype if dtype is None else np.dtype(dtype), name)

    def release(self, name: str) -> None:
        place = self._slices.get(name)
        self._source.release(name if place is None else place.name)
