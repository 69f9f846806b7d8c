"""How tasks are called, and where a swappable one lies."""

from __future__ import annotations

import re
from pathlib import Path

from loracle.reference import ConfigError

from .names import GRAPH_FILE, GRAPH_SUFFIX, SWAPPABLE_FILE, TASK_SUFFIX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAKEN = (GRAPH_FILE, SWAPPABLE_FILE)


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be a task's."""
    if not is_name(name):
        taken = " or ".join(repr(file.removesuffix(GRAPH_SUFFIX)) for file in _TAKEN)
        raise ConfigError(
            f"name: expected letters, digits, '.', '_' and '-' for a task, and not {taken}, got {name!r}"
        )


def is_name(name: str) -> bool:
    """Whether a task can be called so."""
    return bool(_NAME.fullmatch(name)) and f"{name}{GRAPH_SUFFIX}".lower() not in _TAKEN


def task_file(deployment: Path, name: str) -> Path:
    """Where a deployment's task has its tensors. Raises ConfigError: `name` cannot be a task's."""
    check_name(name)
    return deployment / f"{name}{TASK_SUFFIX}"


def swappable_names(deployment: Path) -> tuple[str, ...]:
    """The names of a deployment's swappable tasks, sorted."""
    found = (path.name.removesuffix(TASK_SUFFIX) for path in deployment.glob(f"*{TASK_SUFFIX}"))
    return tuple(sorted(filter(is_name, found)))
