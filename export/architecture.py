"""Which architectures can be exported, read from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.files.architectures import ARCHITECTURES, architecture_of
from loracle.reference import ConfigError

from .tasks import Task, task_of

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MIXTURES = tuple(kind for kind, architecture in ARCHITECTURES.items() if architecture.experts)
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_supported(config: Mapping[str, Any], source: str, *, trusted: bool = False) -> Task:
    """Return the task of a model; refuse one whose graph would not be the model's own mathematics.

    Args:
        config: the content of `config.json`.
        source: how to name it.
        trusted: whether code of the model's own may run.

    Raises ConfigError naming the key of `config.json`, what was expected and what came.
    """
    _check_code(config.get("auto_map"), source, trusted)
    task = task_of(config, source)
    architecture = architecture_of(config)
    for key in _EXPERTS:
        if config.get(key) and not (architecture and architecture.experts):
            raise ConfigError(
                f"{source}: {key}: expected none for the model_type {config.get('model_type')!r}, got "
                f"{config[key]!r}; of the mixtures of experts {', '.join(_MIXTURES)} can be exported"
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


def _check_code(auto_map: Any, source: str, trusted: bool) -> None:
    """Raise ConfigError unless there is no code of the model's own, or it is trusted and in its folder."""
    if not auto_map:
        return
    if not trusted:
        raise ConfigError(
            f"{source}: auto_map: expected none, got code of the model's own; read it, and let it run with "
            "--trust-remote-code"
        )
    for name, place in auto_map.items() if isinstance(auto_map, Mapping) else [("auto_map", auto_map)]:
        places = place if isinstance(place, list) else [place]
        if not all(own is None or (isinstance(own, str) and "--" not in own) for own in places):
            raise ConfigError(
                f"{source}: auto_map: {name}: expected code in the model's folder, got {place!r}; "
                "copy its files into the folder"
            )
