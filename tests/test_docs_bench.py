"""docs/bench.md: its first box runs, and its table has every method."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import blocks_of

from loracle.export.bench.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs/bench.md"


def test_the_table_has_every_method_and_no_other() -> None:
    named = re.findall(r"^\| `([a-z][a-z-]+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert tuple(named) == METHODS


def test_the_output_is_a_whole_one() -> None:
    (shown,) = (block.text for block in blocks_of(PAGE.read_text("utf-8")) if block.language == "text")
    assert "A/A control" in shown
    assert "the paper's claim" in shown


@pytest.mark.slow
def test_the_box_writes_both_files(tmp_path: Path) -> None:
    (box,) = (block for block in blocks_of(PAGE.read_text("utf-8")) if block.info == "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", box.text],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
    )
    assert json.loads((tmp_path / "evidence/bench.json").read_text())["kind"] == "loracle bench"
    assert (tmp_path / "evidence/bench.png").is_file()
