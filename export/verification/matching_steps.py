"""The steps by which weights are matched, beside those by content alone: names, copies, what is left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .content_search import ContentSearch, Found, Place
from .content_signature import ROUNDED, least_similarity
from .weight_signatures import Group

BY_NAME = "by name"
BY_CONTENT = "by content"
BY_NAME_ALONE = "by name alone"
"""Its content is like no weight's."""
BY_PLACE = "by place"
"""It stands beside a weight of the same module, or is what is left over."""
SHARED = "by content, shared with an equal weight"
PLUS_ONE = "by content, plus 1"
"""The graph holds 1 more than the weight, as the norms of some models multiply by."""

_NEARER = 4
"""How many times further away, in squares, the weight of a tensor's name may be than the most similar one."""


def give_named(search: ContentSearch, named: Mapping[str, str]) -> None:
    """Give tensors to the weights of their names, unless they are like those by chance alone, or much more
    like another one, or 1 more than they."""
    for held, name in named.items():
        home = search.home(name)
        if home is None:
            continue
        group, index = home
        scored = [(float(search.similarities(p, group)[index]), p) for p in search.places(group, [held])]
        score, place = max(scored, key=lambda item: item[0], default=(0.0, Place(held)))
        if score < least_similarity(group.entries) or _is_one_more(search, held, group, index):
            continue
        if 1 - score <= ROUNDED or 1 - score <= _NEARER * (1 - _best_similarity(search, held)):
            search.claim(name, Found(place, BY_NAME))


def _is_one_more(search: ContentSearch, held: str, group: Group, index: int) -> bool:
    """Whether a tensor is 1 more than a weight that is a vector, but for rounding."""
    if group.shape[1] > 1:
        return False
    return bool(1 - search.similarities(Place(held), group, 1)[index] <= ROUNDED)


def _best_similarity(search: ContentSearch, held: str) -> float:
    """How like a tensor is to the weight that it is most like."""
    scores = (
        float(search.similarities(place, group).max())
        for group in search.groups.values()
        for place in search.places(group, [held])
    )
    return max(scores)


def give_copies(search: ContentSearch, groups: Iterable[Group], least: float) -> None:
    """Give tensors that hold nothing yet to the weight that they are another copy of."""
    for group in groups:
        for place in search.places(group):
            scores = search.similarities(place, group)
            name = group.names[int(scores.argmax())]
            if scores.max() >= least and name in search.found and place.initializer not in search.claimed:
                search.claim(name, Found(place, BY_CONTENT))


def give_left_over(search: ContentSearch, named: Mapping[str, str]) -> None:
    """Give what is like no weight to the one of its name; and where as many tensors of one shape are left as
    weights, one to each in order."""
    for held, name in named.items():
        home = search.home(name)
        if home is not None and held not in search.claimed and name not in search.found:
            for place in search.places(home[0], [held])[:1]:
                search.claim(name, Found(place, BY_NAME_ALONE))
    for group in search.groups.values():
        missing = search.missing(group)
        left = {place.initializer: place for place in _usual_way_last(search, group)}
        in_order = [left[name] for name in search.held if name in left]
        if missing.size == len(in_order):
            for index, place in zip(missing, in_order, strict=True):
                search.claim(group.names[index], Found(place, BY_PLACE))


def _usual_way_last(search: ContentSearch, group: Group) -> list[Place]:
    """The places that hold nothing, those last that lie as the weights of the group that have been found."""
    known = [search.found[name][0].place.transposed for name in group.names if name in search.found]
    usual = known.count(True) > known.count(False)
    return sorted(search.places(group), key=lambda place: place.transposed == usual)


def share_equal(search: ContentSearch) -> None:
    """Let missing weights have the place of one with the same content, which a graph need hold only once."""
    for group in search.groups.values():
        holders = [
            found.place
            for name in group.names
            for found in search.found.get(name, [])
            if found.place.rows is None and found.how != PLUS_ONE
        ]
        missing = search.missing(group)
        if not missing.size or not holders:
            continue
        scores = group.similarity(search.signatures(holders, group.shape), missing)
        for column, index in enumerate(missing):
            best = int(scores[:, column].argmax())
            if scores[best, column] >= 1 - ROUNDED:
                search.claim(group.names[index], Found(holders[best], SHARED))
