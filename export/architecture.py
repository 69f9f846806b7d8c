"""Which architectures can be exported, read from `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loracle.reference import ConfigError

SUPPORTED = ("llama", "mistral", "qwen2")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def check_supported(config: Mapping[str, Any], source: str) -> None:
    """Refuse an architecture whose fused graph would not be the model's own mathematics.

    Raises ConfigError naming the key of `config.json`, what was expected and what came.
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ConfigError(f"{source}: model_type: expected one of {', '.join(SUPPORTED)}, got {kind!r}")
    if config.get("sliding_window") is not None and config.get("use_sliding_window", kind == "mistral"):
        raise ConfigError(
            f"{source}: sliding_window: expected null, got {config['sliding_window']}; "
            "attention over a sliding window cannot be exported yet"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _STATIC_ROPE:
        raise ConfigError(
            f"{source}: rope_type: expected one of {', '.join(_STATIC_ROPE)}, got {rope_type!r}, "
            "whose angles depend on the length of the input"
        )
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ConfigError(f"{source}: partial_rotary_factor: expected 1.0, got another value")
