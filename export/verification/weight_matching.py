"""Which weight of a model lies where in anyone's graph, whatever it is called there.

A name counts where the content does not speak against it; else the content alone. Content is compared by
similarity, so that a weight is found whatever an adapter, or a fault, has made of it: what it should be is
not asked here. Of each tensor a few hundred entries are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from loracle.files import MergedWeights
from loracle.files.architectures import architecture_of
from loracle.files.tensor_names import TensorNames

from ..matching import WeightSource
from .beside_products import give_biases
from .content_search import ContentSearch, Found, equal_but_for_rounding, nearly_equal
from .content_signature import ROUNDED, as_matrix, least_similarity, matrix_shape
from .graph_tensors import Array, HeldTensor, held_tensors
from .matching_steps import (
    BY_CONTENT,
    BY_PLACE,
    PLUS_ONE,
    give_copies,
    give_left_over,
    give_named,
    share_equal,
)
from .quantized_tensors import may_be_quantized, quantized_shapes
from .weight_signatures import weight_groups

AGAINST_NAME = "by content, against its name"
"""The initializer has the name of another weight."""

_COPY = 0.5
"""The least similarity of another copy of a matrix: of tied embeddings one may have been changed."""


@dataclass(frozen=True)
class Match:
    """Where one weight lies.

    Attributes:
        weight: its name in the base's checkpoint.
        initializer: its name in the candidate's graph, a key of `held_tensors`.
        how: how it was told: "by name", "by content", or what else of `matching_steps`.
        transposed: whether the initializer holds the weight's transpose.
        rows: of several weights in one initializer, the range of this one's rows, in the checkpoint's
            orientation; None for all of it.
        shape: the weight's in the checkpoint; None for that of what `view` finds.
        less_one: the weight, where the initializer holds 1 more.
    """

    weight: str
    initializer: str
    how: str
    transposed: bool
    rows: tuple[int, int] | None
    shape: tuple[int, ...] | None = None
    less_one: Array | None = field(default=None, repr=False, compare=False)

    def view(self, held: Array) -> Array:
        """Return, of the initializer's array, the weight in the checkpoint's orientation.

        It is a view, unless 1 was added to the weight. Then it has the weight's entries where the initializer
        has the next number to 1 more, as that is all that can be told of them; elsewhere its own, less 1.
        """
        if self.shape is None:
            matrix = held.T if self.transposed else held
        else:
            matrix = as_matrix(held, matrix_shape(self.shape)[1], transposed=self.transposed)
        if self.rows is not None:
            matrix = matrix[self.rows[0] : self.rows[1]]
        own = matrix if self.shape is None else matrix.reshape(self.shape)
        return own if self.less_one is None else _less_one(own, self.less_one)

    def __str__(self) -> str:
        turned = f"transpose of {self.initializer}" if self.transposed else self.initializer
        if self.rows is None:
            return turned
        return f"rows {self.rows[0]}:{self.rows[1]} of {'the ' if self.transposed else ''}{turned}"


def _less_one(held: Array, weight: Array) -> Array:
    with np.errstate(over="ignore"):
        rounded = (weight.astype(np.float64) + 1).astype(held.dtype)
        own = weight.astype(held.dtype)
    return np.where(held == rounded, own, (held.astype(np.float64) - 1).astype(held.dtype))


@dataclass(frozen=True)
class Matches:
    """What was found in one graph.

    Attributes:
        found: weight -> its places; more than one where the graph holds copies.
        missing: weights of the model that lie nowhere.
        quantized: weights that only a quantised product can hold.
        others: floating-point initializers of two axes or more that are no weight.
    """

    found: Mapping[str, tuple[Match, ...]]
    missing: tuple[str, ...]
    quantized: tuple[str, ...]
    others: tuple[str, ...]


def match_weights(graph: ir.Graph, weights: WeightSource) -> Matches:
    """Find each weight of a model among the constants of a graph.

    Of weights with equal content each has the place that comes in the same order. What is no floating-point
    tensor in the checkpoint is passed over.

    Args:
        graph: anyone's; its data files are mapped, and a few entries of each tensor read.
        weights: the model's, which the graph may hold without the adapter, merged, or changed otherwise.

    Raises:
        FileError: a tensor's data are not there, or do not fit its shape.
    """
    held = held_tensors(graph)
    search = ContentSearch(
        {name: own for name, own in held.items() if own.floating and own.size}, weight_groups(weights)
    )
    named = _named(search, weights)
    give_named(search, named)
    matrices = [group for group in search.groups.values() if group.shape[1] > 1]
    vectors = [group for group in search.groups.values() if group.shape[1] == 1]
    for least, skip in ((nearly_equal, False), (least_similarity, True)):
        search.give_whole(matrices, least, BY_CONTENT)
        search.give_packed(lambda columns: columns > 1, least, BY_CONTENT, skip=skip)
    give_copies(search, matrices, _COPY)
    give_biases(graph, search, BY_PLACE)
    for least in (equal_but_for_rounding, nearly_equal):
        search.give_whole(vectors, least, BY_CONTENT)
        search.give_whole(vectors, least, PLUS_ONE, added=1)
    search.give_packed(lambda columns: columns == 1, nearly_equal, BY_CONTENT, skip=False)
    search.give_whole(vectors, least_similarity, BY_CONTENT)
    give_left_over(search, named)
    share_equal(search)
    give_copies(search, vectors, 1 - ROUNDED)
    return _matches(graph, held, search, weights, named)


def _named(search: ContentSearch, weights: WeightSource) -> dict[str, str]:
    """For each tensor of the graph that has a weight's name, but for parts before it, that name."""
    config = weights.config if isinstance(weights, MergedWeights) else {}
    names = TensorNames(weights.names, architecture_of(config))
    found = {}
    for held in search.held:
        parts = held.split(".")
        own = (names.find(".".join(parts[start:])) for start in range(len(parts)))
        name = next(filter(None, own), None)
        if name is not None:
            found[held] = name
    return found


def _matches(
    graph: ir.Graph,
    held: Mapping[str, HeldTensor],
    search: ContentSearch,
    weights: WeightSource,
    named: Mapping[str, str],
) -> Matches:
    found = {
        name: tuple(_match(name, own, weights, named) for own in search.found[name])
        for name in weights.names
        if name in search.found
    }
    quantized = quantized_shapes(graph, held.values())
    absent = [name for name in weights.names if search.home(name) is not None and name not in found]
    coded = tuple(name for name in absent if may_be_quantized(weights.shape(name), quantized))
    others = (name for name, own in search.held.items() if len(own.shape) > 1 and name not in search.claimed)
    return Matches(found, tuple(name for name in absent if name not in coded), coded, tuple(others))


def _match(name: str, found: Found, weights: WeightSource, named: Mapping[str, str]) -> Match:
    place = found.place
    against = found.how == BY_CONTENT and named.get(place.initializer, name) != name
    return Match(
        name,
        place.initializer,
        AGAINST_NAME if against else found.how,
        place.transposed,
        place.rows,
        weights.shape(name),
        weights.tensor(name) if found.how == PLUS_ONE else None,
    )
