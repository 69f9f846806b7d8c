"""Do the ways of decoding choose the same tokens?

Greedy texts of one model are the same until two tokens are as likely as each other but for rounding. So the
first token in which a way's text is not ours is held against the unmerged model in float64: both choices must
be within twice the tolerance of the most likely token's logit (numerics, clause 7: each of two logits may be
off by the tolerance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter

Text = Sequence[int]
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """Where a way's text leaves ours.

    Attributes:
        place: of the token, among the new ones.
        margin: how far the float64 logit of the less likely of the two tokens is below the largest.
        limit: what rounding explains.
    """

    place: int
    margin: float
    limit: float

    @property
    def explained(self) -> bool:
        return self.margin <= self.limit


def first_difference(one: Text, other: Text) -> int | None:
    """The first place in which two texts of one length differ.

    Raises SystemExit where the lengths differ.
    """
    if len(one) != len(other):
        raise SystemExit(f"expected answers of one length, got {len(one)} and {len(other)} tokens")
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None
    )


def differences(
    base: Path,
    adapter: Path,
    texts: Mapping[Prompt, Text],
    others: Mapping[tuple[str, Prompt], Text],
) -> dict[tuple[str, Prompt], Difference]:
    """The first differences of ways' texts from ours; those that do not differ are left out.

    Args:
        base, adapter: of the model in float64, which is evaluated only where there is a difference.
        texts: for each prompt our answer.
        others: for each way's name and prompt its answer.

    Raises SystemExit, a line for each, where rounding does not explain them.
    """
    places = {key: first_difference(texts[key[1]], text) for key, text in others.items()}
    found: dict[tuple[str, Prompt], Difference] = {}
    truth: Float64Model | None = None
    for (name, prompt), place in places.items():
        if place is None:
            continue
        truth = truth or Float64Model(base, read_adapter(adapter))
        ours = texts[prompt]
        (right,) = truth.evaluate([(*prompt, *ours[:place])], np.dtype(np.float32))
        row = right.logits[-1]
        chosen = min(row[ours[place]], row[others[name, prompt][place]])
        found[name, prompt] = Difference(place, float(row.max() - chosen), 2 * right.tolerance)
    wrong = [
        f"{name}, prompt of {len(prompt)} tokens: token {own.place} is another than ours by a margin of "
        f"{own.margin:.2g}, rounding explains {own.limit:.2g}"
        for (name, prompt), own in found.items()
        if not own.explained
    ]
    if wrong:
        raise SystemExit("\n".join(["nothing to compare", *wrong]))
    return found
