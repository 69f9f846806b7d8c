"""docs/verify.md does what it says: its boxes run in order, its tables and workflow name what is there."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from export_fixtures import make_adapter, make_model
from test_docs import ROOT, blocks_of, run
from test_export_clauses import CLAUSES

from loracle.cli.app import app
from loracle.cli.guard import WRONG_INPUT
from loracle.export.verification.advice import ADVICE
from loracle.export.verification.verdict import Verdict
from loracle.reference import CheckError

PAGE = (ROOT / "docs/verify.md").read_text("utf-8")
WORKFLOW = ROOT / "docs/examples/verify.yml"
BEGIN, END = "<!-- verdicts: begin -->\n", "<!-- verdicts: end -->\n"
PASSES = {
    **dict.fromkeys((Verdict.EXACT, Verdict.UNTOUCHED, Verdict.QUANTIZED), "yes"),
    **dict.fromkeys((Verdict.ROUNDED_TWICE, Verdict.WITHIN_ULPS), "inside the bound"),
}


def verdict_table() -> str:
    """The table of verdicts as the page has it."""
    rows = [("verdict", "what it means", "passes", "what to do"), ("---",) * 4]
    for verdict, advice in ADVICE.items():
        rows.append((str(verdict), advice.meaning, PASSES.get(verdict, "no"), advice.remedy))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _command(line: str) -> Any:
    """What `loracle` makes of a line, without doing it."""
    program, name, *arguments = shlex.split(line)
    assert program == "loracle"
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return commands[name].make_context(name, arguments)


def test_the_table_of_verdicts_is_that_of_the_program() -> None:
    assert PAGE.partition(BEGIN)[2].partition(END)[0] == verdict_table()


def test_each_field_of_a_certificate_is_on_the_page() -> None:
    path = importlib.resources.files("loracle.export") / "schemas" / "certificate.schema.json"
    table = PAGE.partition("Version 1 has:")[2].partition("The files of an input")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(json.loads(path.read_text("utf-8"))["properties"])


def test_each_option_is_on_the_page() -> None:
    options = {option for own in _command("loracle verify x --model y").command.params for option in own.opts}
    common = {"candidate", "--record", "--trust-remote-code", "--debug", "--help"}
    assert options - common <= set(re.findall(r"`(--[a-z-]+)", PAGE))


def test_clauses_are_those_of_the_numeric_contract() -> None:
    page = (ROOT / "docs/numerics.md").read_text("utf-8")
    headings = re.findall(r"^#+ ([0-9.]+?)\.? (.+)$", page, re.M)
    for number, title, _ in CLAUSES:
        assert (number, title) in headings


def test_exit_codes() -> None:
    assert re.findall(r"^\| (\d) \|", PAGE, re.M) == ["0", str(CheckError.exit_code), str(WRONG_INPUT)]


def test_links_lead_to_what_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
    assert "docs/verify.md" in (ROOT / "README.md").read_text("utf-8")


def test_the_workflow_gates_the_release() -> None:
    content = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    verify, release = content["jobs"]["verify"], content["jobs"]["release"]
    assert release["needs"] == "verify"
    steps = [*verify["steps"], *release["steps"]]
    for step in (step for step in steps if "uses" in step):
        assert re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", step["uses"])
    assert not [step for step in steps if step.get("continue-on-error")]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    (given,) = (_command(line).params for line in lines if line.startswith("loracle "))
    assert given["exact"] is True
    assert given["certificate"] == Path("certificate.json")
    assert given["html"] == Path("certificate.html")
    upload = next(step for step in verify["steps"] if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    assert all(path.match(upload["with"]["path"]) for path in (given["certificate"], given["html"]))
    assert "pip install" in " ".join(lines)


def test_every_command_on_the_page_is_one() -> None:
    lines = [line for block in blocks_of(PAGE) for line in block.text.splitlines()]
    found = [_command(line) for line in lines if line.startswith("loracle ")]
    assert len(found) == 4


@pytest.mark.slow
def test_the_page_runs_and_says_what_it_shows(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    make_adapter(tmp_path / "adapter", tmp_path / "base")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "80",
    }
    blocks = blocks_of(PAGE)
    said = run(blocks, tmp_path, environment)
    (shown,) = (block.text for block in blocks if block.info == "text")
    assert shown in "".join(f"{line.rstrip()}\n" for line in said.splitlines())
    path = importlib.resources.files("loracle.export") / "schemas" / "certificate.schema.json"
    content = json.loads((tmp_path / "certificate.json").read_text())
    jsonschema.Draft202012Validator(json.loads(path.read_text("utf-8"))).validate(content)
    assert f"{content['inputs']['candidate']['sha256']}  -" in said
    assert (tmp_path / "certificate.html").is_file()
