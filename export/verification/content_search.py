"""Where in a graph matrices of known content lie: each place is given to the matrix that it is most like."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .content_signature import (
    ROUNDED,
    as_matrix,
    as_signature,
    layouts,
    sampled,
)
from .graph_tensors import HeldTensor
from .weight_signatures import Group, Shape

Array = np.ndarray[Any, Any]
Least = Callable[[int], float]
"""From a signature's entries to the least similarity that counts."""

_CHUNK = 256
_DIGITS = 5
"""Similarities that agree so far are equal: products are summed in an order that depends on the position."""


@dataclass(frozen=True)
class Place:
    """Where in a graph one matrix lies: in an initializer, or in rows of it, as it is or transposed."""

    initializer: str
    transposed: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Found:
    """A place of a weight, and how it was told."""

    place: Place
    how: str


def equal_but_for_rounding(_: int) -> float:
    """The least similarity of what differs by rounding alone."""
    return 1 - ROUNDED


def nearly_equal(_: int) -> float:
    """The least similarity of what differs by little more than rounding."""
    return 0.99


class ContentSearch:
    """Which matrices have been found where; the only thing that changes as the search goes on.

    Args:
        held: the graph's tensors, in the order of their use.
        groups: the matrices to find, by their shapes.
        convert: what is done to signatures (n, k) of the graph's tensors before they are compared.

    Attributes:
        found: the places of each matrix, in the order in which they were found.
        claimed: the tensors that hold something.
    """

    def __init__(
        self,
        held: Mapping[str, HeldTensor],
        groups: Mapping[Shape, Group],
        convert: Callable[[Array], Array] = lambda signatures: signatures,
    ) -> None:
        self.held = held
        self.groups = groups
        self.found: dict[str, list[Found]] = {}
        self.claimed: set[str] = set()
        self._convert = convert
        self._open = {shape: np.ones(len(group.names), bool) for shape, group in groups.items()}
        self._at = {name: (shape, i) for shape, group in groups.items() for i, name in enumerate(group.names)}
        self._read: dict[tuple[Place, Shape], Array] = {}

    def claim(self, name: str, found: Found) -> None:
        """Note that a matrix lies in a place."""
        shape, index = self._at[name]
        self._open[shape][index] = False
        self.claimed.add(found.place.initializer)
        self.found.setdefault(name, []).append(found)

    def home(self, name: str) -> tuple[Group, int] | None:
        """Return the group of a matrix, and its index there; None where it is none of those to find."""
        shape, index = self._at.get(name, (None, 0))
        return None if shape is None else (self.groups[shape], index)

    def missing(self, group: Group) -> Array:
        """Return the indices of the group's matrices that have not been found."""
        return np.flatnonzero(self._open[group.shape])

    def places(self, group: Group, tensors: Iterable[str] | None = None) -> list[Place]:
        """Return where a matrix of the group's shape may be a whole tensor; of those that hold nothing, or of
        `tensors`."""
        names = [name for name in self.held if name not in self.claimed] if tensors is None else tensors
        return [
            Place(name, transposed)
            for name in names
            for rows, columns, transposed in layouts(self.held[name].shape)
            if (rows, columns) == group.shape
        ]

    def signatures(self, places: Collection[Place], shape: Shape, added: float = 0) -> Array:
        """Return (n, k), the entries of the places by which a matrix of `shape` is known, less `added`."""
        held = np.stack([self._signature(place, shape) for place in places])
        return self._convert(held - np.float32(added) if added else held)

    def similarities(self, place: Place, group: Group, added: float = 0) -> Array:
        """Return (n,): how like a place, less `added`, is to each of the group's matrices."""
        result: Array = group.similarity(self.signatures([place], group.shape, added))[0]
        return result

    def give_whole(self, groups: Iterable[Group], least: Least, how: str, *, added: float = 0) -> None:
        """Give every whole tensor that, less `added`, is like a missing matrix to the one that it is most
        like."""
        for group in groups:
            while self._give(group, least(group.entries), how, added):
                pass

    def give_packed(self, columns: Callable[[int], bool], least: Least, how: str, *, skip: bool) -> None:
        """Give the rows of tensors in which matrices of one width follow one another, in either orientation.

        Args:
            columns: which widths are looked for.
            skip: whether rows that are like no matrix may lie between.
        """
        for name, held in self.held.items():
            if name in self.claimed:
                continue
            for rows, width, transposed in layouts(held.shape):
                if columns(width):
                    pieces = self._pieces(Place(name, transposed), rows, width, least, skip)
                    for matrix, place in pieces:
                        self.claim(matrix, Found(place, how))
                    if pieces:
                        break

    def _give(self, group: Group, least: float, how: str, added: float) -> bool:
        missing = self.missing(group)
        places = self.places(group) if missing.size else []
        if not places:
            return False
        best, scores = self._best(places, group, missing, added)
        given = False
        for index in np.argsort(-np.round(scores, _DIGITS), kind="stable"):
            place = places[index]
            if scores[index] < least:
                break
            twins = np.flatnonzero(self._open[group.shape] & (group.twins == group.twins[best[index]]))
            if place.initializer not in self.claimed and twins.size:
                self.claim(group.names[twins[0]], Found(place, how))
                given = True
        return given

    def _best(self, places: list[Place], group: Group, among: Array, added: float) -> tuple[Array, Array]:
        """For each place the index of the matrix that it is most like, and how like it is."""
        best, scores = [], []
        for start in range(0, len(places), _CHUNK):
            held = self.signatures(places[start : start + _CHUNK], group.shape, added)
            found = group.similarity(held, among)
            best.append(among[np.round(found, _DIGITS).argmax(1)])
            scores.append(found.max(1))
        return np.concatenate(best), np.concatenate(scores)

    def _pieces(
        self, place: Place, rows: int, width: int, least: Least, skip: bool
    ) -> list[tuple[str, Place]]:
        """The matrices that follow one another in a tensor; none, where they do not fill it, or `skip`."""
        groups = [g for g in self.groups.values() if g.shape[1] == width and g.shape[0] < rows]
        used: set[str] = set()
        pieces: list[tuple[str, Place]] = []
        start = 0
        while start < rows:
            piece = self._piece(place, start, rows, groups, least, used)
            if piece is None and skip:
                later = sorted({start + group.shape[0] for group in groups})
                piece = next(filter(None, self._later(place, later, rows, groups, least, used)), None)
            if piece is None:
                break
            pieces.append(piece)
            used.add(piece[0])
            assert piece[1].rows is not None
            start = piece[1].rows[1]
        return pieces if start == rows or skip else []

    def _later(
        self,
        place: Place,
        starts: list[int],
        rows: int,
        groups: list[Group],
        least: Least,
        used: set[str],
    ) -> Iterator[tuple[str, Place] | None]:
        for start in starts:
            yield self._piece(place, start, rows, groups, least, used)

    def _piece(
        self, place: Place, start: int, rows: int, groups: list[Group], least: Least, used: set[str]
    ) -> tuple[str, Place] | None:
        """The missing matrix that the rows from `start` on are most like."""
        best: tuple[float, str, Place] | None = None
        for group in groups:
            stop = start + group.shape[0]
            missing = [i for i in self.missing(group) if group.names[i] not in used]
            if stop > rows or not missing:
                continue
            own = Place(place.initializer, place.transposed, (start, stop))
            scores = group.similarity(self.signatures([own], group.shape), np.array(missing))[0]
            score = float(scores.max())
            if score >= least(group.entries) and (best is None or score > best[0]):
                best = (score, group.names[missing[int(np.round(scores, _DIGITS).argmax())]], own)
        return None if best is None else best[1:]

    def _signature(self, place: Place, shape: Shape) -> Array:
        key = (place, shape)
        if key not in self._read:
            rows, columns = sampled(*shape)
            start = 0 if place.rows is None else place.rows[0]

            def take(array: Array) -> Array:
                matrix = as_matrix(array, shape[1], transposed=place.transposed)
                return as_signature(matrix[np.ix_(rows + start, columns)])

            self._read[key] = self.held[place.initializer].read(take)
        return self._read[key]
