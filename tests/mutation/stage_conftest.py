"""At the root of a staged tree: ends a run that would test the installed modules and not the mutants."""

from pathlib import Path

import pytest

import loracle.reference


def pytest_configure(config: pytest.Config) -> None:
    imported = Path(loracle.reference.__file__).resolve()
    if not imported.is_relative_to(config.rootpath.resolve()):
        raise pytest.UsageError(
            f"loracle.reference: expected the copy in {config.rootpath}, got {imported}; "
            "the tests would run on code that is never mutated"
        )
