"""The machine that a result was measured on, in a few words: no host name, no path."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe_machine() -> tuple[tuple[str, str], ...]:
    """(label, value) of processor, cores, memory and system; no host name, no path."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        ("processor", processor()),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("memory", f"{memory:.0f} GiB"),
        ("system", f"{platform.system()} {platform.machine()}"),
    )


def machine_document(packages: Iterable[str]) -> dict[str, Any]:
    """What a result file says of the machine: `describe_machine`, and the versions of Python and of those
    packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**dict(describe_machine()), "python": platform.python_version(), "versions": versions}


def processor() -> str:
    """The processor's model name; the architecture where the system does not tell."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
