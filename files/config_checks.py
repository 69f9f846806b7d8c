"""What the values of a LoRA configuration may be, each alone and together; one-line errors that name the key.

Source: PEFT 0.21, ``LoraConfig.__post_init__`` and the constructors of its layers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loracle.reference import ConfigError

from .config_keys import BASE_CHANGING, BASE_CHANGING_UNSUPPORTED, BASE_PRESERVING, NEUTRAL, is_neutral
from .matching import check_pattern, pattern_value

ALL_LINEAR = "all-linear"
"""The word that stands for every linear layer but the output layer; it needs a model to mean anything."""

ATTENTION = "attention"
"""The word that stands for the attention's projections; PEFT has none for them. It needs a model too."""

CONVERT = "convert the adapter with PEFT's path_initial_model_for_weight_conversion"

TokenIndices = tuple[int, ...] | Mapping[str, tuple[int, ...]] | None

_MOST = 2**31 - 1


def wrong(name: str, expected: str, got: object) -> ConfigError:
    """Return the error for a value that is not what its key takes."""
    return ConfigError(f"{name}: expected {expected}, got {short(got)}; correct the adapter's config")


def short(value: object) -> str:
    """Return ``repr(value)``, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_neutral(name: str, value: object) -> None:
    """Refuse a value that switches on what only a neutral value is supported for."""
    if not is_neutral(name, value):
        raise ConfigError(
            f"{name}: {short(value)} changes the mathematics and is not supported, expected "
            f"{NEUTRAL[name]!r}; train the adapter without it"
        )


def check_rank(name: str, value: object) -> int:
    """Return a rank: an integer of at least 1, and no larger than any matrix."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, "an integer of at least 1", value)
    if value > _MOST:
        raise wrong(name, f"an integer of at most {_MOST}", value)
    return value


def check_finite(name: str, value: object) -> float:
    """Return a finite number, as it was given."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, "a number", value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise wrong(name, "a finite number", value)
    return value


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)


def module_names(name: str, value: object) -> tuple[str, ...] | str | None:
    """Return a set of module names, sorted, or the one expression or word given in their place."""
    if value is None:
        return None
    if isinstance(value, str):
        if name == "layers_pattern" or value.lower() != ALL_LINEAR:
            check_pattern(value)
        return value
    names = _strings(name, value, "a list of module names or a string")
    for expression in names if name == "layers_pattern" else ():
        check_pattern(expression)
    return names if name == "layers_pattern" else tuple(sorted(set(names)))


def listed_names(name: str, value: object) -> tuple[str, ...] | None:
    """Return names in their order, none of them empty; a single string is no list.

    What ``modules_to_save`` names, `inside_saved` takes for expressions.
    """
    if value is None:
        return None
    names = _strings(name, None if isinstance(value, str) else value, "a list of names or null")
    if "" in names:
        raise wrong(name, "names that are not empty", "")
    for expression in names if name == "modules_to_save" else ():
        check_pattern(expression)
    return names


def layer_numbers(value: object) -> tuple[int, ...] | int | None:
    """Return ``layers_to_transform``: numbers, one number, or None."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
        raise wrong("layers_to_transform", "layer numbers", value)
    return tuple(value)


def token_indices(value: object) -> TokenIndices:
    """Return ``trainable_token_indices``: numbers of tokens, or such for each named embedding, in order."""
    name = "trainable_token_indices"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _tokens(name, value)
    for key in value:
        if not isinstance(key, str) or not key:
            raise wrong(name, "names of embeddings as keys", key)
    return {key: _tokens(f"{name}[{key!r}]", tokens) for key, tokens in value.items()}


def numbers_by_pattern(name: str, value: object, check: Callable[[str, object], Any]) -> dict[str, Any]:
    """Return ``rank_pattern`` or ``alpha_pattern``: expressions for module paths, each with its number."""
    if not isinstance(value, Mapping):
        raise wrong(name, "an object of module patterns and numbers", value)
    for key, number in value.items():
        if not isinstance(key, str):
            raise wrong(name, "module patterns as keys", key)
        pattern_value("", {key: number}, number)
        check(f"{name}[{key!r}]", number)
    return dict(value)


def check_initialisation(value: object) -> None:
    """Refuse a start that is unknown, not reproducible, or needs more than the base's weights."""
    name = "init_lora_weights"
    lowered = value.lower() if isinstance(value, str) else ""
    if isinstance(value, bool) or lowered in BASE_PRESERVING | BASE_CHANGING:
        return
    if lowered.startswith("pissa_niter"):
        raise ConfigError(
            f"{name}: {short(value)} changes the base weights by a randomised approximation, which nothing "
            f"can do again; train with 'pissa', or {CONVERT}"
        )
    if lowered in BASE_CHANGING_UNSUPPORTED:
        raise ConfigError(
            f"{name}: {short(value)} changes the base weights and is not supported, expected true, false or "
            f"one of {_known_starts()}; {CONVERT}"
        )
    raise ConfigError(
        f"{name}: {short(value)} is unknown, expected true, false or one of {_known_starts()}; correct the "
        f"adapter's config"
    )


def check_combinations(values: Mapping[str, Any]) -> None:
    """Refuse values that are right alone and have no meaning together, as PEFT does."""
    if isinstance(values["target_modules"], str):
        for name in ("layers_to_transform", "layers_pattern"):
            if values[name] is not None:
                raise wrong(name, "null where target_modules is a string", values[name])
    if values["layers_pattern"] and values["layers_to_transform"] is None:
        raise wrong("layers_to_transform", "layer numbers where layers_pattern is given", None)
    if values["lora_bias"]:
        if isinstance(values["init_lora_weights"], str):
            raise wrong("init_lora_weights", "true or false beside lora_bias", values["init_lora_weights"])
        if values["use_dora"]:
            raise wrong("lora_bias", "false beside use_dora, which rescales no bias", True)
    if values["target_parameters"]:
        if values["lora_dropout"] > 0:
            raise wrong(
                "lora_dropout",
                "0 beside target_parameters, whose input no layer sees",
                values["lora_dropout"],
            )
        for name in ("lora_bias", "use_dora", "fan_in_fan_out"):
            if values[name]:
                raise wrong(name, "false beside target_parameters", True)
    tokens, saved = values["trainable_token_indices"], values["modules_to_save"] or ()
    for name in tokens if isinstance(tokens, Mapping) else ():
        if name in saved:
            raise wrong(
                "trainable_token_indices", "embeddings that modules_to_save does not train whole", name
            )


def _known_starts() -> str:
    return ", ".join(sorted(BASE_PRESERVING | BASE_CHANGING))


def _strings(name: str, value: object, expected: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence | set | frozenset) or not all(isinstance(item, str) for item in value):
        raise wrong(name, expected, value)
    return tuple(value)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(type(item) is int and 0 <= item <= _MOST for item in value):
        raise wrong(name, f"numbers of tokens from 0 to {_MOST}", value)
    seen: set[int] = set()
    for item in value:
        if item in seen:
            raise wrong(name, "each token once", item)
        seen.add(item)
    return tuple(value)
