"""What the verdicts on all weights come to: counted, the wrong ones named, the worst first."""

from loracle.export.verification.verdict import Verdict, WeightVerdict
from loracle.export.verification.weights_check import counted, weights_check, worst_first

EXACT = WeightVerdict("exact", Verdict.EXACT, True, merged=True)
LEFT = WeightVerdict("left", Verdict.UNTOUCHED, True)
NEAR = WeightVerdict("near", Verdict.WITHIN_ULPS, True, merged=True, unequal=7)
NEARER = WeightVerdict("nearer", Verdict.WITHIN_ULPS, True, merged=True, unequal=2)
TWICE = WeightVerdict("twice", Verdict.TWICE, False, merged=True, unequal=5)
WORSE = WeightVerdict("worse", Verdict.TWICE, False, merged=True, unequal=9)
ABSENT = WeightVerdict("absent", Verdict.ABSENT, False, detail="found none")


def test_verdicts_are_counted_in_their_order() -> None:
    found = counted([TWICE, LEFT, EXACT, WORSE, LEFT])
    assert list(found.items()) == [(Verdict.EXACT, 1), (Verdict.UNTOUCHED, 2), (Verdict.TWICE, 2)]
    assert counted([]) == {}


def test_what_fails_comes_first_and_the_more_entries_the_earlier() -> None:
    assert worst_first([NEARER, TWICE, EXACT, NEAR, ABSENT, WORSE, LEFT]) == [
        WORSE,
        TWICE,
        ABSENT,
        NEAR,
        NEARER,
    ]


def test_a_check_passes_where_every_weight_does() -> None:
    said = weights_check([EXACT, LEFT, NEAR], exact=False)
    assert said.name == "weights are the merge, within rounding"
    assert said.passed
    assert said.figure == "3 weights, 2 merged: 1 correctly rounded, 1 untouched, 1 within k ulp"
    assert said.failures == ()
    strict = weights_check([EXACT], exact=True)
    assert strict.name == "weights are the correctly rounded merge"
    assert strict.passed


def test_what_fails_is_named_and_no_more_than_eight() -> None:
    said = weights_check([EXACT, TWICE, ABSENT, NEAR], exact=False)
    assert not said.passed
    assert said.failures == (str(TWICE), str(ABSENT))
    eight = weights_check([ABSENT] * 8, exact=False)
    assert eight.failures == (str(ABSENT),) * 8
    ten = weights_check([LEFT, *[TWICE] * 9, ABSENT], exact=False)
    assert ten.failures == (*(str(TWICE),) * 8, "and 2 more weights")
