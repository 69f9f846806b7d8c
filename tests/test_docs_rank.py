"""docs/rank.md does what it says: its boxes run in order, and its options are the commands'."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from export_fixtures import make_adapter, make_model
from test_docs import ROOT, blocks_of, run
from test_docs_extract import options_of

from loracle.files import read_adapter

PAGE = (ROOT / "docs/rank.md").read_text("utf-8")


@pytest.mark.slow
def test_the_page_runs_and_does_what_it_says(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base")
    make_adapter(tmp_path / "other-adapter", tmp_path / "base", r=3, seed=2)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = run(blocks_of(PAGE), tmp_path, environment)
    assert "phi(1, 1)" in said
    assert json.loads((tmp_path / "analysis.json").read_text())["kind"] == "loracle rank analyse"
    names = ("smaller", "the-same")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names)
    assert one == other
    assert {pair.r for pair in read_adapter(tmp_path / "rank-two").pairs.values()} == {2}


@pytest.mark.parametrize("command", ["analyse", "truncate"])
def test_each_option_is_on_the_page(command: str) -> None:
    common = {"adapter", "--out", "--debug", "--help"}
    assert options_of("rank", command) - common <= set(re.findall(r"(--[a-z]+)", PAGE))
