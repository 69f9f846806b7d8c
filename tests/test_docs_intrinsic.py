"""docs/intrinsic.md: its options are the command's, and its projections are all that there are."""

from __future__ import annotations

import re

import typer
from test_docs import ROOT

from loracle.cli.app import app
from loracle.torch_impl.intrinsic.projection import PROJECTIONS

PAGE = (ROOT / "docs/intrinsic.md").read_text("utf-8")


def test_each_option_on_the_page_is_one() -> None:
    command = typer.main.get_command(app).commands["intrinsic"]  # type: ignore[attr-defined]
    options = {option for own in command.params for option in (*own.opts, *own.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", PAGE))
    assert named <= options
    assert named >= {"--dims", "--lr", "--full-lr", "--seeds", "--projection", "--resume", "--test-data"}


def test_each_projection_is_in_the_table() -> None:
    assert sorted(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)) == sorted(PROJECTIONS)
