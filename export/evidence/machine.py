"""The machine that a result file names."""

from __future__ import annotations

from .fields import Fields


def machine_line(document: Fields) -> str:
    """Return `loracle.files.machine.machine_document` as a line."""
    machine = document.part("machine")
    words = dict(machine.pairs())
    line = ", ".join(
        words[name] + (" cores" if name == "cores" else "")
        for name in ("processor", "cores", "memory", "system")
        if name in words
    )
    return f"{line}; {versions_line(machine)}"


def versions_line(document: Fields) -> str:
    """Return a line of the packages and versions that a document names."""
    return ", ".join(f"{name} {version}" for name, version in document.part("versions").pairs())
