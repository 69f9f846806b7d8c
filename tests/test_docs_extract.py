"""docs/extract.md does what it says: its boxes run, and its options and exit codes are the command's."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from export_fixtures import make_adapter, make_model
from test_docs import ROOT, blocks_of, run

from loracle.cli.app import app
from loracle.files import Checkpoint, read_adapter, write_merged_checkpoint
from loracle.files.safetensors_writer import write_safetensors
from loracle.torch_impl.extraction.decomposition import FULL_SIDE
from loracle.torch_impl.extraction.refinement import MOST_ENTRIES

PAGE = (ROOT / "docs/extract.md").read_text("utf-8")


def options_of(*names: str) -> set[str]:
    command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.slow
def test_the_page_runs_and_does_what_it_says(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    make_adapter(tmp_path / "given", tmp_path / "base")
    write_merged_checkpoint(tmp_path / "base", tmp_path / "given", tmp_path / "tuned")
    with Checkpoint(tmp_path / "tuned") as tuned:
        tensors = {name: np.array(tuned.tensor(name)) for name in tuned.names}
    tensors["model.norm.weight"] += 1
    write_merged_checkpoint(tmp_path / "base", tmp_path / "given", tmp_path / "tuned-whole")
    (tmp_path / "tuned-whole/model.safetensors").unlink()
    write_safetensors(tmp_path / "tuned-whole/model.safetensors", tensors, {"format": "pt"})
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = run(blocks_of(PAGE), tmp_path, environment)
    assert "its merge is the tuned checkpoint, bit for bit" in said
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("tuned", "merged")]
    assert files[0] == files[1]
    assert "model.norm.weight: saved whole" in said
    assert read_adapter(tmp_path / "whole").config.modules_to_save == ("model.norm",)


def test_each_option_is_on_the_page() -> None:
    common = {"--base", "--tuned", "--out", "--debug", "--help"}
    assert options_of("extract") - common <= set(re.findall(r"`(--[a-z]+)", PAGE))


def test_exit_codes_and_limits() -> None:
    assert re.findall(r"^\| (\d) \|", PAGE, re.M) == ["0", "1", "2"]
    assert f"more than {MOST_ENTRIES / 1e6:.2f} million" in PAGE
    assert f"more than {FULL_SIDE} rows" in PAGE
