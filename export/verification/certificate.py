"""The certificate of a verification: what was verified, by its SHA-256, what was found, and by which rules.

It is a JSON document, which `schemas/certificate.schema.json` describes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loracle.files import write_atomic

from .clauses import Clause, clauses_of
from .digests import InputDigest
from .report import VerifyReport
from .statement import statement
from .weights_check import counted

FORMAT = "loracle-certificate"
VERSION = 1
ROLES = ("base", "adapter", "candidate")

_PACKAGES = (
    "loracle",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
)

Option = str | int | float | bool | None


@dataclass(frozen=True)
class Certificate:
    """A verification.

    Attributes:
        time: when it ended, in UTC.
        report: what was found.
        inputs: by "base", "adapter" and "candidate"; without "adapter" where there is none.
        clauses: of the numeric contract that were applied.
        versions: of Python, the platform, and the packages that are there.
        options: that the verification was made with.
    """

    time: str
    report: VerifyReport
    inputs: Mapping[str, InputDigest]
    clauses: tuple[Clause, ...]
    versions: Mapping[str, str]
    options: Mapping[str, Option]

    @property
    def statement(self) -> str:
        """The verdict in a sentence."""
        return statement(self.report)

    def to_json(self) -> dict[str, Any]:
        """A plain object, as the schema describes it."""
        report = self.report
        weights = report.weights
        return {
            "format": FORMAT,
            "version": VERSION,
            "time": self.time,
            "statement": self.statement,
            **report.to_json(),
            "inputs": {role: self.inputs[role].to_json() if role in self.inputs else None for role in ROLES},
            "summary": {
                "weights": len(weights),
                "merged": sum(own.merged for own in weights),
                "failed": sum(not own.passed for own in weights),
                "entries": sum(own.entries for own in weights),
                "unequal": sum(own.unequal for own in weights),
                "verdicts": {verdict.name.lower(): number for verdict, number in counted(weights).items()},
            },
            "clauses": [clause.to_json() for clause in self.clauses],
            "versions": dict(self.versions),
            "options": dict(self.options),
            "weights": [own.to_json() for own in weights],
        }


def certificate_of(report: VerifyReport, options: Mapping[str, Option] | None = None) -> Certificate:
    """Return the certificate of a verification that has just ended.

    Args:
        report: of `verify`, called with `digests=True`.
        options: that it was called with, by the names of the command's options.
    """
    return Certificate(
        datetime.now(UTC).isoformat(timespec="seconds"),
        report,
        {own.role: own for own in report.inputs},
        clauses_of(report),
        _versions(),
        {} if options is None else dict(options),
    )


def certificate_bytes(certificate: Certificate) -> bytes:
    """The document as it is written: JSON in ASCII."""
    return (json.dumps(certificate.to_json(), indent=1, allow_nan=False) + "\n").encode("ascii")


def write_certificate(path: str | Path, certificate: Certificate) -> None:
    """Write the document, whole or not at all. Raises FileError where it cannot be written."""
    write_atomic(path, certificate_bytes(certificate))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
