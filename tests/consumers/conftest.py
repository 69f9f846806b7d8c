"""Folders that all tests of other people's runtimes share."""

from pathlib import Path

import pytest
from consumer_fixtures import Exports, make_exports


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Exports:
    return make_exports(tmp_path_factory.mktemp("consumers"))


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, _own_cache: None) -> Path:
    """SmolLM2 with an adapter linked as the task french."""
    from export_fixtures import make_adapter

    from loracle.export import export

    root = tmp_path_factory.mktemp("smollm2")
    adapter = make_adapter(root / "adapter", smollm2, r=4, alpha=4)
    export(smollm2, root / "deployment", adapter, form="linked", name="french")
    return root / "deployment"
