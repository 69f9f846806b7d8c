"""Mutation testing of `reference/`: one operator, number or argument changes at a time; a test has to fail.

mutmut derives a mutant's import name from its path and needs the tests beside it, so modules and tests are
copied to ``build/mutants/<what>``; there `reference/` is ``loracle/reference`` and hides the installed one.

    python tests/mutation/run.py [module ...] [--tests name ...]

Without names: every module of `reference/` and every tests/test_reference_*.py. With names: these modules and
the tests named, or those that have a module's name in theirs. docs/mutants.md says what is counted.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LISTED = REPOSITORY / "docs" / "mutants.md"
STAGES = REPOSITORY / "build" / "mutants"
MUTMUT = Path(sys.executable).with_name("mutmut")
REQUIRED = 0.95
COLUMNS = ("killed", "survived", "timeout", "no tests", "other")

# Counts the examples in docstrings, of which mutmut makes a copy for each mutant.
_NOT_RUN = {"test_reference_doctests"}

# One thread per worker, one order of every set, and hypothesis without the search for a smallest example.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "LORACLE_TEST_PROFILE": "mutation",
}


@dataclass(frozen=True)
class Mutant:
    """``function`` is a function's name or ``Class.method``; ``change`` is `` `old` -> `new` ``, see
    `change_of`.
    """

    module: str
    function: str
    change: str


@dataclass(frozen=True)
class Result:
    """What became of one mutant; ``status`` as mutmut names it."""

    name: str
    status: str

    @property
    def module(self) -> str:
        return split_name(self.name)[0]


def split_name(name: str) -> tuple[str, str]:
    """Return module and function of mutmut's name for a mutant.

    ``loracle.reference.tiles.x_tiles__mutmut_3`` is in ("tiles", "tiles"),
    ``loracle.reference.precision.xǁPrecisionǁgrowth__mutmut_1`` in ("precision", "Precision.growth").
    """
    qualified = name.removeprefix("loracle.reference.").partition("__mutmut_")[0]
    module, _, mangled = qualified.partition(".")
    function = mangled.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in mangled else mangled.removeprefix("x_")
    return module, function


def change_of(diff: str) -> str:
    """Return the lines that a unified diff takes out and those that it puts in, in one line.

    Every run of white space is one space, so that a mutant is recognised after the code has been indented
    otherwise or moved.
    """
    body = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "@@", "#"))]
    old, new = (" ".join(" ".join(x[1:] for x in body if x[:1] == sign).split()) for sign in "-+")
    return f"`{old}` -> `{new}`"


def listed_mutants(page: str) -> set[Mutant]:
    """Return the mutants in the tables of docs/mutants.md: rows of module.function, change and reason.

    Raises:
        ValueError: a row gives no reason.
    """
    found = set()
    for line in page.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 3 or not cells[1].startswith("`"):
            continue
        if not cells[2]:
            raise ValueError(
                f"{LISTED.name}: expected a reason why {cells[0]} {cells[1]} survives; write one"
            )
        module, _, function = cells[0].strip("`").partition(".")
        found.add(Mutant(module, function, cells[1]))
    return found


def as_row(mutant: Mutant) -> str:
    """Return the row that lists a mutant, its reason left open."""
    return f"| `{mutant.module}.{mutant.function}` | {mutant.change.replace('|', chr(92) + '|')} | |"


def summary(results: Sequence[Result]) -> str:
    """Return a table of counts: a line for each module and one for all."""
    lines = [f"{'module':<26}{'all':>6}" + "".join(f"{name:>10}" for name in COLUMNS) + f"{'killed':>9}"]
    modules = sorted({result.module for result in results})
    for label, chosen in [*((m, [r for r in results if r.module == m]) for m in modules), ("all", results)]:
        count = Counter(r.status if r.status in COLUMNS else "other" for r in chosen)
        counts = "".join(f"{count[name]:>10}" for name in COLUMNS)
        lines.append(f"{label:<26}{len(chosen):>6}{counts}{100 * killed_share(chosen):>8.1f}%")
    return "\n".join(lines)


def killed_share(results: Sequence[Result]) -> float:
    """Return which part of the mutants a test killed; a timeout, or one that no test calls, is none."""
    return sum(result.status == "killed" for result in results) / len(results) if results else 1.0


def complaints(results: Sequence[Result], survivors: Sequence[Mutant], listed: set[Mutant]) -> list[str]:
    """Return what fails the run: too few kills, survivors that the page does not list."""
    share = killed_share(results)
    found = [f"killed {share:.1%}, required {REQUIRED:.0%}"] if share < REQUIRED else []
    unlisted = [mutant for mutant in survivors if mutant not in listed]
    if unlisted:
        found.append(f"{len(unlisted)} survivors are not in docs/{LISTED.name}; kill or list them:")
        found += map(as_row, unlisted)
    return found


def tests_of(modules: Sequence[str], named: Sequence[str]) -> list[Path]:
    """Return the test modules tests/test_reference_NAME.py that are named, or else that fit the modules.

    Those fit that have a module's name in theirs; where none has `linear_shapes`, those that have `linear`;
    all, if no module is named or none fits.
    """
    tests = [p for p in sorted((REPOSITORY / "tests").glob("test_reference_*.py")) if p.stem not in _NOT_RUN]
    if named:
        return [path for path in tests if path.stem.removeprefix("test_reference_") in named]
    chosen: set[Path] = set()
    for module in modules:
        words = module.split("_")
        names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
        matches = [[path for path in tests if name in path.stem] for name in names]
        chosen.update(next(filter(None, matches), tests))
    return sorted(chosen) if modules else tests


def stage(folder: Path, modules: Sequence[str], test_modules: Sequence[Path]) -> None:
    """Write the tree that mutmut runs in: all of `reference/`, the given tests and what tests import."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        REPOSITORY / "reference",
        folder / "loracle" / "reference",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    tests = REPOSITORY / "tests"
    (folder / "tests").mkdir()
    helpers = [path for path in tests.glob("*.py") if not path.name.startswith("test_")]
    for path in [*helpers, *test_modules]:
        shutil.copy2(path, folder / "tests")
    shutil.copy2(tests / "mutation" / "stage_conftest.py", folder / "conftest.py")
    files = ", ".join(f'"loracle/reference/{module}.py"' for module in modules)
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert "mutmut" in tomllib.loads(text)["tool"], "the settings that are the same for every run"
    (folder / "pyproject.toml").write_text(
        text.replace("[tool.mutmut]\n", f"[tool.mutmut]\nonly_mutate = [{files}]\n")
    )


def run_mutmut(folder: Path) -> list[Result]:
    """Test every mutant of a staged tree and return what became of each."""
    log = folder / "mutmut.log"
    environment = os.environ | _ENVIRONMENT
    with log.open("w") as output:
        done = subprocess.run(
            [MUTMUT, "run"], cwd=folder, env=environment, stdout=output, stderr=output, check=False
        )
    if done.returncode:
        print(log.read_text()[-4000:], file=sys.stderr)
        raise SystemExit(
            f"mutmut ended with {done.returncode}; the tests have to pass before code is mutated"
        )
    lines = _mutmut(folder, "results", "--all", "true").splitlines()
    return [Result(*line.strip().rsplit(": ", 1)) for line in lines if ": " in line]


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
    if unknown := set(chosen) - set(known):
        parser.error(f"expected modules of reference/, got {', '.join(sorted(unknown))}")
    folder = STAGES / ("+".join(chosen) or "all")
    start = time.monotonic()
    stage(folder, chosen or known, tests_of(chosen, arguments.tests))
    results = run_mutmut(folder)
    names = [result.name for result in results if result.status != "killed"]
    with ThreadPoolExecutor() as pool:
        diffs = list(pool.map(lambda name: _mutmut(folder, "show", name), names))
    report = folder / "survivors.txt"
    report.write_text("\n".join(diffs))
    survivors = [Mutant(*split_name(name), change_of(diff)) for name, diff in zip(names, diffs, strict=True)]
    listed = listed_mutants(LISTED.read_text())
    print(summary(results))
    took = time.monotonic() - start
    print(f"{took:.0f} seconds; {len(survivors)} survivors: diffs in {report.relative_to(REPOSITORY)}")
    if not chosen:
        for stale in sorted(listed - set(survivors), key=as_row):
            print(f"listed in docs/{LISTED.name} but killed: {stale.module}.{stale.function} {stale.change}")
    found = complaints(results, survivors, listed)
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
