"""docs/deployments.md does what it says: its boxes run in order, on a small model."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import jsonschema
import pytest
from export_fixtures import make_adapter, make_model
from test_docs import ROOT, blocks_of, run

PAGE = ROOT / "docs/deployments.md"


@pytest.mark.slow
def test_the_page_runs_and_does_what_it_says(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    make_adapter(tmp_path / "french", tmp_path / "base")
    make_adapter(tmp_path / "german", tmp_path / "base", ("gate_proj",), seed=2)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    said = run(blocks_of(PAGE.read_text("utf-8")), tmp_path, environment)
    assert re.search(r"french +│ swappable +│ 4 +│ q_proj, v_proj +│ .*│ 20", said)
    assert re.search(r"german +│ swappable +│ 4 +│ gate_proj +│ .*│ no ", said)
    assert "('french', 'german')" in said
    manifest, schema = (
        json.loads((tmp_path / name).read_text()) for name in ("manifest.json", "deployment.schema.json")
    )
    jsonschema.Draft202012Validator(schema).validate(manifest)
    assert not list((tmp_path / "deployment").glob("*frisian*"))
    assert not list((tmp_path / "deployment").glob("dutch*"))


def test_the_page_names_each_field_of_a_task() -> None:
    page = PAGE.read_text("utf-8")
    schema = json.loads((ROOT / "export/schemas/deployment.schema.json").read_text("utf-8"))
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`) \|", page, re.M))))
    assert set(schema["$defs"]["task"]["properties"]) - {"name", "form"} <= named
