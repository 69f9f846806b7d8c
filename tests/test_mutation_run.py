import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from mutation import run
from mutation.rooms import FILES, REFERENCE, ROOMS, VERIFICATION, room_and_module

TESTS = Path(__file__).parent


def test_tests_are_chosen_by_name():
    everything = REFERENCE.all_tests()
    assert {"rounding", "linear", "bounds"} < set(everything)
    assert "doctests" not in everything
    names = ["bounds", "linear", "adapted_linear", "tiles"]
    assert REFERENCE.own_tests("tiles", names) == ["tiles"]
    assert REFERENCE.own_tests("linear", names) == ["linear", "adapted_linear"]
    assert REFERENCE.own_tests("linear_shapes", names) == ["linear", "adapted_linear"]
    assert REFERENCE.own_tests("operands", names) == names


@pytest.fixture
def tree(tmp_path):
    """A staged tree as mutmut leaves it: its settings, and all else in mutants/."""
    folder = tmp_path / "mutants"
    run.stage(REFERENCE, folder, ["tiles", "formats"], ["tiles", "formats"])
    return folder


def run_pytest(folder, **environment):
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir=.", "tests"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=run.os.environ | {"LORACLE_OWN_TESTS_ONLY": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_tree_has_its_modules_their_tests_and_what_tests_import(tree):
    settings = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert settings["only_mutate"] == ["loracle/reference/tiles.py", "loracle/reference/formats.py"]
    told = json.loads((tree / "own_tests.json").read_text())
    assert told["own"] == {"tiles": ["tiles"], "formats": ["formats"]}
    assert (told["package"], told["prefix"]) == ("loracle.reference", "test_reference_")
    staged = {path.name for path in (tree / "tests").iterdir()}
    assert {name for name in staged if name.startswith("test_")} == {
        "test_reference_tiles.py",
        "test_reference_formats.py",
    }
    assert {"conftest.py", "strategies.py", "exact_linear.py"} <= staged


def test_a_staged_tree_tests_its_own_copy_of_the_reference(tree):
    code, output = run_pytest(tree)
    assert code == 0, output
    assert "test_reference_formats.py" in output
    (tree / "loracle" / "reference" / "tiles.py").write_text("raise ImportError('the copy')\n")
    code, output = run_pytest(tree)
    assert code != 0
    assert "the copy" in output


def test_a_mutant_is_tested_by_its_own_tests_unless_all_are_wanted(tree):
    mutant = "loracle.reference.tiles.x_tiles__mutmut_1"
    _, output = run_pytest(tree, MUTANT_UNDER_TEST=mutant)
    assert "test_reference_tiles.py::" in output
    assert "test_reference_formats.py::" not in output
    _, output = run_pytest(tree, MUTANT_UNDER_TEST=mutant, LORACLE_OWN_TESTS_ONLY="0")
    assert "test_reference_formats.py::" in output
    _, output = run_pytest(tree, MUTANT_UNDER_TEST="stats")
    assert "test_reference_formats.py::" in output


def test_a_tree_without_its_own_copy_is_refused(tmp_path):
    (tmp_path / "conftest.py").write_text((TESTS / "mutation" / "stage_conftest.py").read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    told = {"package": "loracle.reference", "prefix": "test_reference_", "own": {}}
    (tmp_path / "own_tests.json").write_text(json.dumps(told))
    code, output = run_pytest(tmp_path)
    assert code == 4
    assert "loracle.reference: expected the copy in" in output


def test_rooms_name_modules_and_tests_that_exist():
    for room in ROOMS.values():
        for module in room.modules:
            assert (run.REPOSITORY / room.folder / f"{module}.py").is_file(), module
        for test in room.all_tests():
            assert (TESTS / f"{room.prefix}{test}.py").is_file(), test
    assert room_and_module("linear") == (REFERENCE, "linear")
    assert room_and_module("files.adapter") == (FILES, "adapter")
    assert room_and_module("verification.judge") == (VERIFICATION, "judge")
    with pytest.raises(ValueError, match="no_such_module"):
        room_and_module("files.no_such_module")


def test_a_tree_of_another_room_has_all_of_it(tmp_path):
    folder = tmp_path / "mutants"
    run.stage(VERIFICATION, folder, ["ulps"], ["ulps"])
    assert (folder / "loracle" / "export" / "verification" / "ulps.py").is_file()
    assert (folder / "loracle" / "export" / "write.py").is_file()
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert settings["only_mutate"] == ["loracle/export/verification/ulps.py"]
