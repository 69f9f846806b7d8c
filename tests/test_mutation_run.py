import subprocess
import sys
from pathlib import Path

import pytest
from mutation import run
from mutation.run import Mutant, Result

ROOT = Path(__file__).parents[1]
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
    assert run.split_name(name) == expected


def test_a_change_is_one_line_whatever_its_indentation():
    assert run.change_of(DIFF) == MUTANT.change
    assert run.change_of(DIFF.replace("    return", "return")) == MUTANT.change
    assert run.change_of("--- a\n+++ b\n@@ -1 +1 @@\n-    b,\n") == "`b,` -> ``"


def test_what_a_run_prints_can_be_put_into_the_page_once_a_reason_is_given():
    row = run.as_row(MUTANT)
    assert run.listed_mutants(f"# Text\n| a | b | c |\n|---|---|---|\n{row[:-1]} the same. |\n") == {MUTANT}
    with pytest.raises(ValueError, match=r"expected a reason why `rounding._float32_to_odd` .* survives"):
        run.listed_mutants(row)


def results(module, **counts):
    number = iter(range(1000))
    return [
        Result(f"loracle.reference.{module}.x_f__mutmut_{next(number)}", status.replace("_", " "))
        for status, count in counts.items()
        for _ in range(count)
    ]


def test_every_mutant_counts_and_only_a_failed_test_is_a_kill():
    many = results("tiles", killed=95, survived=1, timeout=1, no_tests=1, segfault=1, suspicious=1)
    assert run.killed_share(many) == 0.95
    table = run.summary([*many, *results("rounding", killed=1, survived=1)]).splitlines()
    assert " ".join(table[0].split()) == "module all killed survived timeout no tests other killed"
    assert table[1].split() == ["rounding", "2", "1", "1", "0", "0", "0", "50.0%"]
    assert table[2].split() == ["tiles", "100", "95", "1", "1", "1", "2", "95.0%"]
    assert table[3].split() == ["all", "102", "96", "2", "1", "1", "2", "94.1%"]


def test_a_run_fails_below_95_percent_and_for_each_survivor_that_is_not_listed():
    good, bad = results("tiles", killed=95, survived=5), results("tiles", killed=94, survived=6)
    assert run.complaints(good, [MUTANT], {MUTANT}) == []
    assert run.complaints(bad, [MUTANT], {MUTANT}) == ["killed 94.0%, required 95%"]
    first, row = run.complaints(good, [MUTANT], set())
    assert first == "1 survivors are not in docs/mutants.md; kill or list them:"
    assert row == run.as_row(MUTANT)


def test_tests_are_chosen_by_name():
    def names(modules, named=()):
        return [path.stem.removeprefix("test_reference_") for path in run.tests_of(modules, named)]

    everything = names([])
    assert {"rounding", "linear", "bounds"} < set(everything)
    assert "doctests" not in everything
    assert names(["rounding", "tiles"]) == ["rounding", "tiles"]
    assert names(["linear_shapes"]) == names(["linear"])
    assert {"linear", "adapted_linear"} <= set(names(["linear"])) < set(everything)
    assert names(["no_such_thing"]) == everything
    assert names(["linear"], ["tiles"]) == ["tiles"]


def test_the_page_is_well_formed():
    assert run.listed_mutants(run.LISTED.read_text())


def test_a_staged_tree_tests_its_own_copy_of_the_reference(tmp_path):
    tree = tmp_path / "tree"
    run.stage(tree, ["tiles"], [ROOT / "tests" / "test_reference_tiles.py"])
    assert 'only_mutate = ["loracle/reference/tiles.py"]' in (tree / "pyproject.toml").read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "tests"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tree / "loracle" / "reference" / "tiles.py").write_text("raise ImportError('the copy')\n")
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert "the copy" in done.stdout + done.stderr


def test_a_tree_without_its_own_copy_is_refused(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "mutation" / "stage_conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "loracle.reference: expected the copy in" in done.stderr
