"""What a verdict says, in words and as JSON."""

import json
import math

import pytest

from loracle.export.verification.verdict import Verdict, WeightVerdict, Witness


def test_a_verdict_is_said_with_no_more_than_there_is_to_say() -> None:
    assert str(WeightVerdict("w", Verdict.EXACT, True)) == "w: correctly rounded"
    assert str(WeightVerdict("w", Verdict.ADDED, False, detail="why")) == "w: added; why"
    witness = Witness((3, 5), 0.1, -2.0)
    said = WeightVerdict("w", Verdict.DAMAGED, False, "elsewhere", True, 24, 2, (), "two of them", witness)
    assert str(said) == (
        "w: entries changed; 2 of 24 entries differ from the correctly rounded merge, "
        "[3,5]: expected 0.1, got -2.0; two of them"
    )


def test_json_has_every_field() -> None:
    said = WeightVerdict(
        "w", Verdict.WITHIN_ULPS, True, "at x", True, 24, 3, ((0, 21), (4, 3)), "d", Witness((1,), 0.5, 0.25)
    )
    assert said.to_json() == {
        "name": "w",
        "verdict": "within_ulps",
        "passed": True,
        "place": "at x",
        "merged": True,
        "entries": 24,
        "unequal": 3,
        "ulps": [{"at_most": 0, "entries": 21}, {"at_most": 4, "entries": 3}],
        "detail": "d",
        "witness": {"index": [1], "expected": 0.5, "got": 0.25},
    }
    assert WeightVerdict("w", Verdict.EXACT, True).to_json()["witness"] is None


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_json_holds_no_number_that_json_has_not(value: float, text: str) -> None:
    said = WeightVerdict("w", Verdict.NOT_FINITE, False, witness=Witness((0,), 1.0, value)).to_json()
    assert said["witness"] == {"index": [0], "expected": 1.0, "got": text}
    turned = WeightVerdict("w", Verdict.CHANGED, False, witness=Witness((0,), value, 1.0)).to_json()
    assert turned["witness"]["expected"] == text
    json.dumps([said, turned], allow_nan=False)
