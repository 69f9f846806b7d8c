"""The machine and the versions that a result file belongs to."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from loracle.demo.machine import describe_machine


def describe(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory and package versions; no host name, no path."""
    return {
        **dict(describe_machine()),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }
