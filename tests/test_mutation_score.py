import pytest
from mutation.score import (
    PAGE,
    Mutant,
    Result,
    as_row,
    change_of,
    complaints,
    killed_share,
    listed_mutants,
    split_name,
    summary,
    too_few,
    unlisted,
)

DIFF = """\
# loracle.reference.rounding.x__float32_to_odd__mutmut_7: survived
--- loracle/reference/rounding.py
+++ loracle/reference/rounding.py
@@ -4,6 +4,6 @@
     nearest = values
-    return np.where(inexact, (bits - away) | 1,
-        bits)
+    return np.where(inexact, (bits + away) | 1,
+        bits)
"""
MUTANT = Mutant(
    "rounding",
    "_float32_to_odd",
    "`return np.where(inexact, (bits - away) | 1, bits)`"
    " -> `return np.where(inexact, (bits + away) | 1, bits)`",
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loracle.reference.tiles.x_tiles__mutmut_3", ("tiles", "tiles")),
        ("loracle.reference.rounding.x__float32_to_odd__mutmut_7", ("rounding", "_float32_to_odd")),
        ("loracle.reference.precision.xǁPrecisionǁgrowth__mutmut_1", ("precision", "Precision.growth")),
        (
            "loracle.reference.magnitudes.xǁMagnitudeǁ__add____mutmut_12",
            ("magnitudes", "Magnitude.__add__"),
        ),
    ],
)
def test_a_mutants_name_says_where_it_is(name, expected):
    assert split_name(name) == expected


def test_a_change_is_one_line_whatever_its_indentation():
    assert change_of(DIFF) == MUTANT.change
    assert change_of(DIFF.replace("    return", "return")) == MUTANT.change
    assert change_of("--- a\n+++ b\n@@ -1 +1 @@\n-    b,\n") == "`b,` -> ``"


def test_what_a_run_prints_can_be_put_into_the_page_once_a_reason_is_given():
    row = as_row(MUTANT)
    assert listed_mutants(f"# Text\n| a | b | c |\n|---|---|---|\n{row[:-1]} the same. |\n") == {MUTANT}
    with pytest.raises(ValueError, match=r"expected a reason why `rounding._float32_to_odd` .* survives"):
        listed_mutants(row)


def results(module, **counts):
    number = iter(range(1000))
    return [
        Result(f"loracle.reference.{module}.x_f__mutmut_{next(number)}", status.replace("_", " "))
        for status, count in counts.items()
        for _ in range(count)
    ]


def test_every_mutant_counts_and_only_a_failed_test_is_a_kill():
    many = results("tiles", killed=95, survived=1, timeout=1, no_tests=1, segfault=1, suspicious=1)
    assert killed_share(many) == 0.95
    table = summary([*many, *results("rounding", killed=1, survived=1)]).splitlines()
    assert " ".join(table[0].split()) == "module all killed survived timeout no tests other killed"
    assert table[1].split() == ["rounding", "2", "1", "1", "0", "0", "0", "50.0%"]
    assert table[2].split() == ["tiles", "100", "95", "1", "1", "1", "2", "95.0%"]
    assert table[3].split() == ["all", "102", "96", "2", "1", "1", "2", "94.1%"]


def test_a_run_fails_below_95_percent_and_for_each_survivor_that_is_not_listed():
    good, bad = results("tiles", killed=95, survived=5), results("tiles", killed=94, survived=6)
    assert complaints(good, [MUTANT], {MUTANT}, 0.95) == []
    assert complaints(bad, [MUTANT], {MUTANT}, 0.95) == ["killed 94.0%, required 95%"]
    first, row = complaints(good, [MUTANT], set(), 0.95)
    assert first == "1 survivors are not in docs/mutants.md; kill or list them:"
    assert row == as_row(MUTANT)


def test_elsewhere_each_module_has_its_share():
    good, bad = results("tiles", killed=9, survived=1), results("rounding", killed=89, survived=11)
    assert too_few(good, 0.9) == []
    assert too_few([*good, *bad], 0.9) == ["rounding: killed 89.0%, required 90%"]
    assert unlisted([MUTANT], {MUTANT}) == []
    assert unlisted([MUTANT], set())[1:] == [as_row(MUTANT)]


def test_a_mutant_of_another_room_is_found_on_the_page_again():
    name = "loracle.export.verification.judge.xǁJudgeǁjudge__mutmut_4"
    own = Mutant(*split_name(name), MUTANT.change)
    assert (own.module, own.function, own.room) == ("verification.judge", "Judge.judge", "verification")
    assert split_name("loracle.files.adapter.x_read_adapter__mutmut_2") == ("files.adapter", "read_adapter")
    assert listed_mutants(f"{as_row(own)[:-1]} the same. |") == {own}
    assert MUTANT.room == "reference"


def test_the_page_is_well_formed():
    assert listed_mutants(PAGE.read_text())
