"""Mutation testing of `reference/`: one operator, number or argument changes at a time; a test has to fail.

mutmut derives a mutant's import name from its path and needs the tests beside it, so modules and tests are
copied to ``build/mutants/<what>``; there `reference/` is ``loracle/reference`` and hides the installed one.

    python -m tests.mutation.run [module ...] [--tests name ...]

Without names: every module of `reference/` against its own tests, those that have its name in theirs; then
what survives and is not listed in docs/mutants.md against every tests/test_reference_*.py. With names: these
modules against their own tests, or against the tests named.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .score import PAGE, Mutant, Result, as_row, change_of, complaints, listed_mutants, split_name, summary

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = REPOSITORY / "build" / "mutants"
MUTMUT = Path(sys.executable).with_name("mutmut")

# Counts the examples in docstrings, of which mutmut makes a copy for each mutant.
_NOT_RUN = {"test_reference_doctests"}

# One thread a worker, one order of every set, few hypothesis examples, no plugins to look for 10,000 times.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "LORACLE_TEST_PROFILE": "mutation",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}


def all_tests() -> list[str]:
    """Return the names NAME of all tests/test_reference_NAME.py that are run."""
    paths = sorted((REPOSITORY / "tests").glob("test_reference_*.py"))
    return [path.stem.removeprefix("test_reference_") for path in paths if path.stem not in _NOT_RUN]


def own_tests(module: str, tests: Sequence[str]) -> list[str]:
    """Return the tests that have the module's name in theirs; where none has `linear_shapes`, `linear`'s.

    All tests if none has.
    """
    words = module.split("_")
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    return next(filter(None, ([test for test in tests if name in test] for name in names)), list(tests))


def stage(folder: Path, modules: Sequence[str], tests: Sequence[str]) -> None:
    """Write the tree that mutmut runs in: all of `reference/`, the given tests and what tests import."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        REPOSITORY / "reference",
        folder / "loracle" / "reference",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    source = REPOSITORY / "tests"
    (folder / "tests").mkdir()
    helpers = [path for path in source.glob("*.py") if not path.name.startswith("test_")]
    for path in [*helpers, *(source / f"test_reference_{test}.py" for test in tests)]:
        shutil.copy2(path, folder / "tests")
    shutil.copy2(source / "mutation" / "stage_conftest.py", folder / "conftest.py")
    own = {module: own_tests(module, tests) for module in modules}
    (folder / "own_tests.json").write_text(json.dumps(own))
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert "mutmut" in tomllib.loads(text)["tool"], "the settings that are the same for every run"
    files = ", ".join(f'"loracle/reference/{module}.py"' for module in modules)
    (folder / "pyproject.toml").write_text(
        text.replace("[tool.mutmut]\n", f"[tool.mutmut]\nonly_mutate = [{files}]\n")
    )


def run_mutants(folder: Path, names: Sequence[str], own_tests_only: bool) -> list[Result]:
    """Test the mutants of a staged tree that have one of the names, and return what became of all so far.

    Naming them, if by a pattern, makes mutmut first run all their tests by name. So a test that cannot be
    named, as one of parameters that a generator gives only once, ends the run, and is no kill.
    """
    environment = os.environ | _ENVIRONMENT | {"LORACLE_OWN_TESTS_ONLY": str(int(own_tests_only))}
    log = folder / "mutmut.log"
    with log.open("a") as output:
        done = subprocess.run(
            [MUTMUT, "run", *names], cwd=folder, env=environment, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        print("\n".join(log.read_text().replace("\r", "\n").splitlines()[-20:]), file=sys.stderr)
        raise SystemExit(f"mutmut: expected the tests to pass and 0, got {done.returncode}; see {log}")
    lines = _mutmut(folder, "results", "--all", "true").splitlines()
    return [Result(*line.strip().rsplit(": ", 1)) for line in lines if ": " in line]


def survivors_of(folder: Path, results: Sequence[Result]) -> dict[Result, Mutant]:
    """Return the mutants that were not killed, and write their diffs to survivors.txt in the tree."""
    alive = [result for result in results if not result.killed]
    with ThreadPoolExecutor() as pool:
        diffs = list(pool.map(lambda result: _mutmut(folder, "show", result.name), alive))
    (folder / "survivors.txt").write_text("\n".join(diffs))
    mutants = [Mutant(*split_name(r.name), change_of(diff)) for r, diff in zip(alive, diffs, strict=True)]
    return dict(zip(alive, mutants, strict=True))


def _mutmut(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [MUTMUT, *arguments],
        cwd=folder,
        env=os.environ | _ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="names of modules of reference/; all by default")
    parser.add_argument("--tests", nargs="*", default=[], help="names NAME of tests/test_reference_NAME.py")
    arguments = parser.parse_args()
    chosen = sorted(set(arguments.modules))
    known = sorted(p.stem for p in (REPOSITORY / "reference").glob("*.py") if p.stem != "__init__")
    if unknown := sorted({*chosen} - {*known} | {*arguments.tests} - {*all_tests()}):
        parser.error(f"expected modules of reference/ and tests of theirs, got {', '.join(unknown)}")
    listed = listed_mutants(PAGE.read_text())
    tests = arguments.tests or all_tests()
    if chosen and not arguments.tests:
        tests = sorted({test for module in chosen for test in own_tests(module, tests)})
    folder = STAGES / ("+".join(chosen) or "all")
    start = time.monotonic()
    stage(folder, chosen or known, tests)
    print(
        f"{len(tests)} test modules; progress is in {folder.relative_to(REPOSITORY)}/mutmut.log", flush=True
    )
    results = run_mutants(folder, ["loracle.reference.*"], own_tests_only=not arguments.tests)
    survivors = survivors_of(folder, results)
    if not chosen and (open_cases := [r.name for r, mutant in survivors.items() if mutant not in listed]):
        results = run_mutants(folder, open_cases, own_tests_only=False)
        survivors = survivors_of(folder, results)
    print(summary(results))
    print(f"{time.monotonic() - start:.0f} seconds; diffs of {len(survivors)} survivors: survivors.txt there")
    if not chosen:
        for stale in sorted(map(as_row, listed - {*survivors.values()})):
            print(f"listed in docs/{PAGE.name}, and killed: {stale}")
    found = complaints(results, list(survivors.values()), listed)
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
