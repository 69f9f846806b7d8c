"""How a budget of bytes is spent on singular values: on those first of which a byte keeps most."""

import heapq
from collections.abc import Mapping, Sequence


def spend(spectra: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return the rank of each tensor, 0 included.

    A step takes the singular value s with the largest s^2 for each byte among the tensors' next ones. What
    does not fit any more ends its tensor's turn; cheaper ones go on.

    Args:
        spectra: name to singular values, nonincreasing.
        costs: name to the bytes of one rank.
        budget: in bytes.

    >>> spend({"wide": [3.0, 2.0], "narrow": [2.0, 0.5]}, {"wide": 8, "narrow": 4}, 20)
    {'wide': 2, 'narrow': 1}
    """
    ranks = dict.fromkeys(spectra, 0)
    order = {name: place for place, name in enumerate(spectra)}
    heap = [(-(s[0] ** 2) / costs[name], order[name], name) for name, s in spectra.items() if len(s) and s[0]]
    heapq.heapify(heap)
    left = budget
    while heap:
        _, place, name = heapq.heappop(heap)
        if costs[name] > left:
            continue
        left -= costs[name]
        ranks[name] += 1
        s, r = spectra[name], ranks[name]
        if r < len(s) and s[r]:
            heapq.heappush(heap, (-(s[r] ** 2) / costs[name], place, name))
    return ranks
