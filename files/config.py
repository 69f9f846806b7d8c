"""The configuration of a LoRA adapter, with PEFT's names and PEFT's meaning."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from loracle.reference import ConfigError, lora_scaling

from .config_keys import BASE_PRESERVING, INERT, NEUTRAL, is_neutral
from .matching import ALL_LINEAR, layer_selected, matches, pattern_value

PEFT_TYPE = "LORA"


@dataclass(frozen=True)
class LoraConfig:
    """What one LoRA adapter is: ranks, scalings and the modules it belongs to.

    Names, defaults and meaning are those of PEFT's ``LoraConfig``. Module names are a set, kept as a
    sorted tuple. ``rank_pattern`` and ``alpha_pattern`` map a regular expression for the end of a module path
    to a value; the first match counts.

    Raises:
        ConfigError: a value has the wrong type or range, or switches on a variant of LoRA without support.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", _indices(self.layers_to_transform))
        for name, check in (("rank_pattern", _rank), ("alpha_pattern", _finite)):
            object.__setattr__(self, name, _pattern(name, getattr(self, name), check))
        _rank("r", self.r)
        _finite("lora_alpha", self.lora_alpha)
        if not 0.0 <= _finite("lora_dropout", self.lora_dropout) < 1.0:
            raise _wrong("lora_dropout", "a probability in [0, 1)", self.lora_dropout)
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "true or false", getattr(self, name))
        for name in ("base_model_name_or_path", "task_type"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong(name, "a string or null", getattr(self, name))
        for name in ("use_dora", "bias", "fan_in_fan_out"):
            _require_neutral(name, getattr(self, name))
        _initialisation(self.init_lora_weights)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise _wrong(name, "null where target_modules is a string", getattr(self, name))
        if self.layers_pattern and self.layers_to_transform is None:
            raise _wrong("layers_to_transform", "layer numbers where layers_pattern is given", None)

    def targets(self, path: str) -> bool:
        """Tell whether the module at ``path`` gets an adapter, as far as names can tell.

        Without ``target_modules`` and with ``"all-linear"`` the configuration leaves the choice to the model;
        then every path that is not excluded counts.
        """
        if matches(path, self.exclude_modules):
            return False
        if self.target_modules is None or self.names_all_linear:
            return True
        if not matches(path, self.target_modules):
            return False
        if isinstance(self.target_modules, tuple) and path not in self.target_modules:
            return layer_selected(path, self.layers_to_transform, self.layers_pattern)
        return True

    @property
    def names_all_linear(self) -> bool:
        """Whether ``target_modules`` is the word for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def rank_of(self, path: str) -> int:
        """Return the rank of the module at ``path``: from ``rank_pattern``, else ``r``."""
        return pattern_value(path, self.rank_pattern, self.r)

    def alpha_of(self, path: str) -> float:
        """Return alpha of the module at ``path``: from ``alpha_pattern``, else ``lora_alpha``."""
        return pattern_value(path, self.alpha_pattern, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return alpha / r of the module at ``path``, or alpha / sqrt(r) with ``use_rslora``; float64."""
        return lora_scaling(self.rank_of(path), self.alpha_of(path), self.use_rslora)

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any], source: str = "adapter_config.json") -> "LoraConfig":
        """Return the configuration that the parsed ``adapter_config.json`` describes.

        Raises:
            ConfigError: a key is unknown, holds an unsupported value or has the wrong type; the message
                starts with ``source`` and names the key.
        """
        try:
            peft_type = mapping.get("peft_type")
            if peft_type != PEFT_TYPE:
                raise _wrong("peft_type", f"{PEFT_TYPE!r}", peft_type)
            known = {entry.name for entry in fields(cls)}
            for key, value in mapping.items():
                if key in NEUTRAL:
                    _require_neutral(key, value)
                elif (
                    key not in known
                    and key not in INERT
                    and key != "peft_type"
                    and not is_neutral(key, value)
                ):
                    raise ConfigError(
                        f"{key}: unknown key with value {_short(value)}; it may change the mathematics, "
                        f"so remove it only if you know that it does not"
                    )
            given = {key: value for key, value in mapping.items() if key in known and key not in NEUTRAL}
            for name in ("rank_pattern", "alpha_pattern"):
                if given.get(name, {}) is None:
                    del given[name]
            given.setdefault("task_type", None)
            return cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of an ``adapter_config.json`` that PEFT reads back with the same meaning."""
        result: dict[str, Any] = {"peft_type": PEFT_TYPE, "inference_mode": True, "modules_to_save": None}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            result[entry.name] = value
        return result


def _wrong(name: str, expected: str, got: object) -> ConfigError:
    return ConfigError(f"{name}: expected {expected}, got {_short(got)}; correct the adapter's config")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _require_neutral(name: str, value: object) -> None:
    if not is_neutral(name, value):
        raise ConfigError(
            f"{name}: {_short(value)} changes the mathematics and is not supported, expected "
            f"{NEUTRAL[name]!r}; train the adapter without it"
        )


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(name, "an integer of at least 1", value)
    return value


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, "a number", value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise _wrong(name, "a finite number", value)
    return value


def _names(name: str, value: object) -> tuple[str, ...] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if name != "layers_pattern" and value.lower() != ALL_LINEAR:
            matches("", value)
        return value
    if not isinstance(value, Sequence | set | frozenset) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, "a list of module names or a string", value)
    return tuple(value) if name == "layers_pattern" else tuple(sorted(set(value)))


def _indices(value: object) -> tuple[int, ...] | int | None:
    name = "layers_to_transform"
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
        raise _wrong(name, "layer numbers", value)
    return tuple(value)


def _pattern(name: str, value: object, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "an object of module patterns and numbers", value)
    for key, number in value.items():
        if not isinstance(key, str):
            raise _wrong(name, "module patterns as keys", key)
        pattern_value("", {key: number}, number)
        check(f"{name}[{key!r}]", number)
    return dict(value)


def _initialisation(value: object) -> None:
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in BASE_PRESERVING):
        return
    known = ", ".join(sorted(BASE_PRESERVING))
    raise ConfigError(
        f"init_lora_weights: {_short(value)} is unknown or changes the base weights, expected true, false or "
        f"one of {known}; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
    )
