"""The names that a request may call a model: those of the tasks, and two for the base."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.export.deployment import Deployment

from .errors import RequestError, shortened

BASE = "base"
_LISTED = 20


def names(deployment: Deployment) -> dict[str, str | None]:
    """The tasks by what they are called; None is the base, unless a task has its name."""
    tasks = {task: task for task in deployment.tasks}
    return {BASE: None, deployment.folder.resolve().name: None, **tasks}


def unknown_task(name: str, tasks: Sequence[str]) -> RequestError:
    """There is no such task."""
    there = ", ".join([*tasks[:_LISTED], BASE])
    more = f" and {len(tasks) - _LISTED} more" if len(tasks) > _LISTED else ""
    return RequestError(
        404,
        f"model: expected one of {there}{more}, got {shortened(name)}",
        param="model",
        code="model_not_found",
    )
