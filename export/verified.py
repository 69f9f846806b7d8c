"""The record of a verification: `NAME.verified.json` beside the task `NAME`.

It says which bytes were verified, by their SHA-256, and speaks of no others: where a task of the same name
holds other bytes, the record is none of it. So a record needs no care to be right, whatever is killed when.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loracle.files import write_atomic
from loracle.files.json_file import read_json_object
from loracle.reference import FileError

from .json_fields import OBJECT, SHA256, TEXT, Rule, check_fields, is_number, one_of
from .verification.report import VerifyReport

_SUFFIX = ".verified.json"
_VERSION = 1
_PACKAGES = ("loracle", "numpy", "onnxruntime", "torch", "transformers")


def _is_check(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "figure"}
        and all(isinstance(text, str) for text in value.values())
    )


_RULES: Mapping[str, Rule] = {
    "version": one_of(_VERSION),
    "sha256": SHA256,
    "time": TEXT,
    "checks": Rule(
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_check, value)),
        "checks with name and figure",
    ),
    "largest_error": Rule(lambda value: value is None or is_number(value), "a number or null"),
    "tolerance": Rule(lambda value: value is None or is_number(value), "a number or null"),
    "versions": OBJECT,
}


@dataclass(frozen=True)
class Verified:
    """All checks of `loracle verify` have passed of a task's bytes.

    Attributes:
        sha256: of the bytes, see `TaskDocument.sha256`.
        time: when, in UTC.
        checks: name and figure of each.
        largest_error, tolerance: of the outputs; None where none was held to one.
        versions: of the packages that took part.
    """

    sha256: str
    time: str
    checks: tuple[Mapping[str, str], ...]
    largest_error: float | None
    tolerance: float | None
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**asdict(self), "checks": [dict(check) for check in self.checks]}


def verified_of(report: VerifyReport, sha256: str) -> Verified:
    """What is recorded of a report whose checks have passed, of a task's bytes."""
    described = report.to_json()["logits"]
    return Verified(
        sha256,
        datetime.now(UTC).isoformat(timespec="seconds"),
        tuple({"name": check.name, "figure": check.figure} for check in report.checks),
        described["largest_error"],
        described["tolerance"],
        {package: version(package) for package in _PACKAGES},
    )


def read_verified(deployment: Path, name: str, sha256: str) -> Verified | None:
    """The record of a task that holds these bytes; None where there is none of them that can be read."""
    path = record_file(deployment, name)
    if not path.is_file():
        return None
    try:
        content = read_json_object(path)
        check_fields(content, _RULES, str(path), "verify the task again")
    except FileError:
        return None
    if content.pop("version") != _VERSION or content["sha256"] != sha256:
        return None
    return Verified(**{**content, "checks": tuple(content["checks"])})


def write_verified(deployment: Path, name: str, verified: Verified) -> None:
    """Write the record of a task. Raises FileError where it cannot be written."""
    text = json.dumps({"version": _VERSION, **verified.to_json()}, indent=2) + "\n"
    write_atomic(record_file(deployment, name), text.encode())


def forget(deployment: Path, name: str) -> None:
    """Remove the record of a task, where there is one and that is possible."""
    with suppress(OSError):
        record_file(deployment, name).unlink(missing_ok=True)


def forget_all_but(deployment: Path, names: Collection[str]) -> None:
    """Remove the records of tasks that are not there, where that is possible."""
    with suppress(OSError):
        for path in deployment.glob(f"*{_SUFFIX}"):
            if path.name.removesuffix(_SUFFIX) not in names:
                path.unlink()


def record_file(deployment: Path, name: str) -> Path:
    """Where the record of a task is."""
    return deployment / f"{name}{_SUFFIX}"
