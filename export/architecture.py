"""Which architectures can be exported, read from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.reference import ConfigError

from .tasks import Task, task_of

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_supported(config: Mapping[str, Any], source: str) -> Task:
    """Return the task of a model; refuse one whose graph would not be the model's own mathematics.

    Raises ConfigError naming the key of `config.json`, what was expected and what came.
    """
    if config.get("auto_map"):
        raise ConfigError(
            f"{source}: auto_map: expected none, got code of the model's own; "
            "convert it to a class of transformers"
        )
    task = task_of(config, source)
    for key in _EXPERTS:
        if config.get(key):
            raise ConfigError(
                f"{source}: {key}: expected none, got {config[key]!r}; "
                "a mixture of experts cannot be exported yet"
            )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # One for each kind of layer, where they differ.
    ropes = [own for own in rope.values() if isinstance(own, Mapping)] or [rope]
    for own in ropes:
        rope_type = own.get("rope_type", own.get("type", "default"))
        if rope_type in _STATIC_ROPE:
            continue
        raise ConfigError(
            f"{source}: rope_type: expected one of {', '.join(_STATIC_ROPE)}, got {rope_type!r}, "
            "whose angles depend on the length of the input"
        )
    return task
