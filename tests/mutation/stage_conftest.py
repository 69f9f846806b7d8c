"""At the root of a staged tree: ends a run that would test the installed modules and not the mutants, and
chooses a mutant's own tests."""

import json
import os
from pathlib import Path

import pytest

import loracle.reference

_PACKAGE = "loracle.reference."


def pytest_configure(config: pytest.Config) -> None:
    imported = Path(loracle.reference.__file__).resolve()
    if not imported.is_relative_to(config.rootpath.resolve()):
        raise pytest.UsageError(
            f"loracle.reference: expected the copy in {config.rootpath}, got {imported}; "
            "the tests would run on code that is never mutated"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a mutant is under test, keep its module's own tests, unless all are wanted."""
    mutant = os.environ.get("MUTANT_UNDER_TEST", "")
    if not mutant.startswith(_PACKAGE) or os.environ["LORACLE_OWN_TESTS_ONLY"] == "0":
        return
    own = json.loads((config.rootpath / "own_tests.json").read_text())[mutant.split(".")[2]]
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (kept if item.path.stem.removeprefix("test_reference_") in own else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept
