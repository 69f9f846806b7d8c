"""At the root of a staged tree: ends a run that would test the installed modules and not the mutants, leaves
out what is `slow`, and chooses a mutant's own tests."""

import importlib
import json
import os
from pathlib import Path

import pytest

_STAGED = json.loads((Path(__file__).parent / "own_tests.json").read_text())


def pytest_configure(config: pytest.Config) -> None:
    package = _STAGED["package"]
    imported = Path(str(importlib.import_module(package).__file__)).resolve()
    if not imported.is_relative_to(config.rootpath.resolve()):
        raise pytest.UsageError(
            f"{package}: expected the copy in {config.rootpath}, got {imported}; "
            "the tests would run on code that is never mutated"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a mutant is under test, keep its module's own tests, unless all are wanted."""
    mutant = os.environ.get("MUTANT_UNDER_TEST", "").removeprefix(f"{_STAGED['package']}.")
    own = None
    if mutant.partition(".")[0] in _STAGED["own"] and os.environ["LORACLE_OWN_TESTS_ONLY"] != "0":
        own = _STAGED["own"][mutant.partition(".")[0]]
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        wanted = own is None or item.path.stem.removeprefix(_STAGED["prefix"]) in own
        (kept if wanted and not item.get_closest_marker("slow") else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept
