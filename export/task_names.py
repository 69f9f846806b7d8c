"""How tasks are called, and which a deployment has: a task is there where the file of its name is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from loracle.reference import ConfigError, FileError

from .names import ADAPTER_SUFFIX, GRAPH_FILE, GRAPH_SUFFIX, SWAPPABLE_FILE, TASK_SUFFIX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TAKEN = (GRAPH_FILE, SWAPPABLE_FILE)
SUFFIXES: Mapping[str, str] = {
    "linked": GRAPH_SUFFIX,
    "swappable": TASK_SUFFIX,
    "adapter-inputs": ADAPTER_SUFFIX,
}
"""The forms of tasks, and how the file ends, after the task's name, that makes a task of a form be there."""


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
    return _file(deployment, name, TASK_SUFFIX)


def swappable_names(deployment: Path) -> tuple[str, ...]:
    """The names of a deployment's swappable tasks, sorted."""
    return _names(deployment, TASK_SUFFIX)


def adapter_file(deployment: Path, name: str) -> Path:
    """Where a deployment's task has its adapter. Raises ConfigError: `name` cannot be a task's."""
    return _file(deployment, name, ADAPTER_SUFFIX)


def adapter_names(deployment: Path) -> tuple[str, ...]:
    """The names of a deployment's tasks in the form adapter-inputs, sorted."""
    return _names(deployment, ADAPTER_SUFFIX)


def bound_file(deployment: Path, name: str) -> Path:
    """Where a task has what a session is given for it: its adapter where there is one, or its tensors.

    Raises ConfigError: `name` cannot be a task's.
    """
    adapter = adapter_file(deployment, name)
    return adapter if adapter.is_file() else task_file(deployment, name)


def bound_names(deployment: Path) -> tuple[str, ...]:
    """The names of the tasks that a session is given, in either form, sorted."""
    return tuple(sorted({*swappable_names(deployment), *adapter_names(deployment)}))


def find_tasks(deployment: Path) -> tuple[tuple[str, str], ...]:
    """Name and form of each of a deployment's tasks, sorted."""
    return tuple(
        sorted((name, form) for form, suffix in SUFFIXES.items() for name in _names(deployment, suffix))
    )


def find_task(deployment: Path, name: str) -> tuple[str, Path]:
    """Form and file of a deployment's task.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task, or there are two.
    """
    check_name(name)
    forms = [form for form, suffix in SUFFIXES.items() if (deployment / f"{name}{suffix}").is_file()]
    if not forms:
        there = ", ".join(name for name, _ in find_tasks(deployment)) or "none"
        raise FileError(f"{deployment}: expected one of its tasks ({there}), got {name}")
    if len(forms) > 1:
        raise FileError(
            f"{deployment}: {name}: expected one task of this name, found it {' and '.join(forms)}; remove "
            "one of the files"
        )
    return forms[0], deployment / f"{name}{SUFFIXES[forms[0]]}"


def require_new(deployment: Path, name: str, form: str, *, replace: bool = False) -> None:
    """Raise FileError where a deployment has a task of this name; with `replace`, where in another form."""
    for held, suffix in SUFFIXES.items():
        path = deployment / f"{name}{suffix}"
        if os.path.lexists(path) and not (replace and held == form):
            raise FileError(f"{path}: the deployment has this task; choose another name or remove it")


def _file(deployment: Path, name: str, suffix: str) -> Path:
    check_name(name)
    return deployment / f"{name}{suffix}"


def _names(deployment: Path, suffix: str) -> tuple[str, ...]:
    """The names of the tasks whose files end so, sorted."""
    found = (path.name.removesuffix(suffix) for path in deployment.glob(f"*{suffix}"))
    return tuple(sorted(filter(is_name, found)))
