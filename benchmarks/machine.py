"""The machine and the versions that a result file belongs to."""

from __future__ import annotations

from typing import Any

from loracle.files.machine import machine_document


def describe(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory and package versions; no host name, no path."""
    return machine_document(packages)
