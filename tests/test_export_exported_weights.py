"""The verdict on one weight of an export: judged where the base has it, compared where it is an expert's."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from loracle.export.verification import exported_candidate as module
from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.export.verification.weight_check import TensorDifference


@pytest.mark.parametrize(
    ("merged", "note", "verdict"),
    [
        (True, "; it is the base's", Verdict.MISSING),
        (True, "", Verdict.UNEXPLAINED),
        (False, "", Verdict.CHANGED),
        (False, "; of others", Verdict.CHANGED),
    ],
)
def test_one_experts_weight_that_differs_is_said_with_its_first_entry(
    merged: bool, note: str, verdict: Verdict
) -> None:
    said = WeightVerdict("experts.3", Verdict.EXACT, True, merged=merged, entries=12)
    found = module._different(said, TensorDifference("experts.3", 5, 12, (1, 2), 0.5, 0.25, note))
    assert (found.verdict, found.passed, found.unequal, found.entries) == (verdict, False, 5, 12)
    assert found.witness is not None
    assert (found.witness.index, found.witness.expected, found.witness.got) == ((1, 2), 0.5, 0.25)
    assert found.detail == note.removeprefix("; ")


class Source:
    """A mixture's weights, each expert one of them."""

    merged_names = ("expert 1",)

    def tensor(self, name: str, dtype: Any) -> Any:
        return self.base_tensor(name, dtype) * (2 if name in self.merged_names else 1)

    def base_tensor(self, name: str, dtype: Any) -> Any:
        return np.full((2, 3), {"expert 1": 1.5, "expert 2": 3.0}[name], dtype)


class Named:
    names = ("w",)


class Found:
    found: ClassVar = {"one": "expert 1", "two": "expert 2", "w": "w", "copy": "w"}
    source = Source()


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("one", 3.0, Verdict.EXACT),
        ("one", 1.5, Verdict.MISSING),
        ("one", 4.0, Verdict.UNEXPLAINED),
        ("two", 3.0, Verdict.UNTOUCHED),
        ("two", 4.0, Verdict.CHANGED),
    ],
)
def test_the_weight_of_an_expert_is_compared(name: str, value: float, verdict: Verdict) -> None:
    half = np.dtype(np.float16)
    held = np.full((2, 3), 3.0, half)
    held[1, 2] = value
    if verdict is Verdict.MISSING:
        held[:] = value
    given: Any = (name, held, None, half, Found(), Named(), None)
    said = module._judged(*given)
    right = verdict in (Verdict.EXACT, Verdict.UNTOUCHED)
    assert (said.name, said.verdict, said.passed, said.entries) == (name, verdict, right, 6)
    assert said.merged == (name == "one")
    assert said.unequal == (0 if right else 6 if verdict is Verdict.MISSING else 1)
    if not right:
        assert said.witness is not None
        assert (said.witness.expected, said.witness.got) == (3.0, value)


@pytest.mark.parametrize(("name", "place"), [("w", ""), ("copy", "w")])
def test_a_weight_is_judged_and_its_place_said_where_it_has_another_name(name: str, place: str) -> None:
    given = []

    class Judge:
        def judge(self, *arguments: Any) -> WeightVerdict:
            given.append(arguments)
            return WeightVerdict("w", Verdict.EXACT, True, merged=True, entries=6)

    held, view = np.zeros((2, 3)), object()
    arguments: Any = (name, held, view, held.dtype, Found(), Named(), Judge())
    said = module._judged(*arguments)
    assert (said.name, said.place, said.entries) == (name, place, 6)
    assert given == [("w", held, name, view)]
