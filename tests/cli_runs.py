"""`loracle run`, called in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from loracle.cli.app import app

RUNNER = CliRunner()


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, ["run", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def answers(*arguments: object) -> list[dict[str, Any]]:
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out)["answers"]
    return found
