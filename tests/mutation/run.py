"""Mutation testing: one operator, number or argument changes at a time; a test has to fail.

mutmut derives a mutant's import name from its path and needs the tests beside it, so a room's modules and its
tests are copied to ``build/mutants/<what>``; there `reference/` is ``loracle/reference`` and hides the
installed one. Other rooms are the installed ones.

    python -m tests.mutation.run [module ...] [--room name] [--tests name ...]

Without names: every module of `reference/`, or of the room that is named, against its own tests
(`rooms.Room.own_tests`); then, for `reference/`, what survives and is not listed in docs/mutants.md against
all its tests. With names, as ``linear``, ``files.adapter`` or ``verification.judge``: these modules, of one
room, against their own tests, or against the tests named.
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

from .rooms import REFERENCE, REPOSITORY, ROOMS, Room, room_and_module
from .score import (
    PAGE,
    Mutant,
    Result,
    as_row,
    change_of,
    complaints,
    listed_mutants,
    split_name,
    summary,
    too_few,
    unlisted,
)

STAGES = REPOSITORY / "build" / "mutants"
MUTMUT = Path(sys.executable).with_name("mutmut")

# One thread a worker, one order of every set, few hypothesis examples, no plugins to look for 10,000 times.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "LORACLE_TEST_PROFILE": "mutation",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}


def stage(room: Room, folder: Path, modules: Sequence[str], tests: Sequence[str]) -> None:
    """Write the tree that mutmut runs in: all of the room, the given tests and what tests import."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        REPOSITORY / room.staged,
        folder / "loracle" / room.staged,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    source = REPOSITORY / "tests"
    (folder / "tests").mkdir()
    helpers = [path for path in source.glob("*.py") if not path.name.startswith("test_")]
    for path in [*helpers, *(source / f"{room.prefix}{test}.py" for test in tests)]:
        shutil.copy2(path, folder / "tests")
    shutil.copy2(source / "mutation" / "stage_conftest.py", folder / "conftest.py")
    own = {module: room.own_tests(module, tests) for module in modules}
    (folder / "own_tests.json").write_text(
        json.dumps({"package": room.package, "prefix": room.prefix, "own": own})
    )
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert "mutmut" in tomllib.loads(text)["tool"], "the settings that are the same for every run"
    files = ", ".join(f'"loracle/{room.folder}/{module}.py"' for module in modules)
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


def _parsed() -> tuple[Room, list[str], list[str]]:
    """The room, the modules that are named, and the tests that are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules, as linear or files.adapter; all by default")
    parser.add_argument("--room", choices=ROOMS, help="all modules of this room; reference by default")
    parser.add_argument("--tests", nargs="*", default=[], help="names NAME of tests/test_ROOM_NAME.py")
    arguments = parser.parse_args()
    try:
        named = [room_and_module(name) for name in arguments.modules]
    except ValueError as error:
        parser.error(str(error))
    rooms = {room.name for room, _ in named} | ({arguments.room} if arguments.room else set())
    if len(rooms) > 1:
        parser.error(f"expected modules of one room, got {', '.join(sorted(rooms))}; run them one by one")
    room = ROOMS[rooms.pop()] if rooms else REFERENCE
    if unknown := sorted({*arguments.tests} - {*room.all_tests()}):
        parser.error(f"expected tests of {room.folder}/, got {', '.join(unknown)}")
    return room, sorted({module for _, module in named}), arguments.tests


def main() -> int:
    room, chosen, only = _parsed()
    listed = listed_mutants(PAGE.read_text())
    tests = only or room.all_tests()
    if chosen and not only:
        tests = sorted({test for module in chosen for test in room.own_tests(module, tests)})
    folder = STAGES / ("+".join([room.name, *chosen]) if chosen else room.name)
    start = time.monotonic()
    stage(room, folder, chosen or room.modules, tests)
    print(
        f"{len(tests)} test modules; progress is in {folder.relative_to(REPOSITORY)}/mutmut.log", flush=True
    )
    results = run_mutants(folder, [f"{room.package}.*"], own_tests_only=not only)
    survivors = survivors_of(folder, results)
    retried = not chosen and not room.tests
    if retried and (open_cases := [r.name for r, mutant in survivors.items() if mutant not in listed]):
        results = run_mutants(folder, open_cases, own_tests_only=False)
        survivors = survivors_of(folder, results)
    print(summary(results))
    print(f"{time.monotonic() - start:.0f} seconds; diffs of {len(survivors)} survivors: survivors.txt there")
    if not chosen:
        own = {mutant for mutant in listed if mutant.room == room.name}
        for stale in sorted(map(as_row, own - {*survivors.values()})):
            print(f"listed in docs/{PAGE.name}, and killed: {stale}")
    alive = list(survivors.values())
    if room.tests:
        found = too_few(results, room.required)
        print("\n".join([*found, *unlisted(alive, listed)]))
        return bool(found)
    found = complaints(results, alive, listed, room.required)
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
