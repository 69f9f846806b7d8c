"""The configuration of a LoRA adapter, with PEFT's names and PEFT's meaning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from loracle.reference import ConfigError, lora_scaling

from .config_checks import (
    ALL_LINEAR,
    ATTENTION,
    TokenIndices,
    check_combinations,
    check_finite,
    check_flag,
    check_initialisation,
    check_rank,
    layer_numbers,
    listed_names,
    module_names,
    numbers_by_pattern,
    require_neutral,
    short,
    token_indices,
    wrong,
)
from .config_keys import BASE_CHANGING, INERT, NEUTRAL, is_neutral
from .matching import inside_saved, layer_selected, matches, names_parameter, pattern_value, saved

PEFT_TYPE = "LORA"
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraConfig:
    """What one LoRA adapter is: ranks, scalings and the modules it belongs to.

    Names, defaults and meaning are those of PEFT's ``LoraConfig``. Module names are a set, kept as a sorted
    tuple; lists of other names keep their order.

    Attributes:
        r, lora_alpha, use_rslora: the rank, and alpha of the scaling alpha / r (or alpha / sqrt(r)).
        lora_dropout: the probability that an entry of an adapter's input is dropped in training.
        target_modules: names (a module's whole path or its end), an expression for whole paths,
            ``"all-linear"``, or ``"attention"`` for the projections of the architecture's attention (a word
            that PEFT has not); None leaves the choice to the architecture. The words need a model.
        exclude_modules: names, or an expression, of modules that get no adapter.
        layers_to_transform, layers_pattern: which numbered layers, and the name of their list.
        rank_pattern, alpha_pattern: an expression for the end of a path to a value; the first match counts.
        bias: which of the base's biases are trained: ``"none"``, ``"all"``, or ``"lora_only"`` for those of
            the adapted layers.
        lora_bias: whether ``lora_B`` has a bias.
        use_dora: whether each row of the adapted weight has a magnitude of its own.
        fan_in_fan_out: whether weights are stored (in, out), as GPT-2's are.
        modules_to_save: ends of paths of modules that are trained and saved whole.
        trainable_token_indices: tokens whose rows of the input embedding are trained, or such for each
            embedding named by the end of its path. The order is that of the rows in a file.
        target_parameters: ends of paths of parameters, of a mixture's stacked experts for one, that get an
            update of their own.
        init_lora_weights: how a training run starts; of no effect afterwards unless `changes_base`.
        ensure_weight_tying: whether what is trained of a tied embedding stays tied.
        base_model_name_or_path, task_type: for the reader of the file.

    Raises:
        ConfigError: a value has the wrong type or range, switches on a variant of LoRA without support, or
            has no meaning together with another.
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
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: TokenIndices = field(default=None, hash=False)
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self._set(name, module_names(name, getattr(self, name)))
        for name in ("modules_to_save", "target_parameters"):
            self._set(name, listed_names(name, getattr(self, name)))
        self._set("layers_to_transform", layer_numbers(self.layers_to_transform))
        self._set("trainable_token_indices", token_indices(self.trainable_token_indices))
        self._set("rank_pattern", numbers_by_pattern("rank_pattern", self.rank_pattern, check_rank))
        self._set("alpha_pattern", numbers_by_pattern("alpha_pattern", self.alpha_pattern, check_finite))
        check_rank("r", self.r)
        check_finite("lora_alpha", self.lora_alpha)
        if not 0.0 <= check_finite("lora_dropout", self.lora_dropout) < 1.0:
            raise wrong("lora_dropout", "a probability in [0, 1)", self.lora_dropout)
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
            check_flag(name, getattr(self, name))
        if self.bias not in BIASES:
            raise wrong("bias", f"one of {', '.join(map(repr, BIASES))}", self.bias)
        for name in ("base_model_name_or_path", "task_type"):
            if not isinstance(getattr(self, name), str | None):
                raise wrong(name, "a string or null", getattr(self, name))
        check_initialisation(self.init_lora_weights)
        check_combinations({entry.name: getattr(self, entry.name) for entry in fields(self)})

    def targets(self, path: str) -> bool:
        """Tell whether the module at ``path`` gets an adapter, as far as names can tell.

        Where the configuration leaves the choice to the model, that is without ``target_modules`` and
        ``target_parameters`` and with one of the words, every path that is not excluded counts. A module that
        is saved whole, or lies in one, gets no adapter.
        """
        if matches(path, self.exclude_modules) or inside_saved(path, self.modules_to_save):
            return False
        if self.target_modules is None:
            return self.target_parameters is None
        if self.names_all_linear or self.names_attention:
            return True
        if not matches(path, self.target_modules):
            return False
        if isinstance(self.target_modules, tuple) and path not in self.target_modules:
            return layer_selected(path, self.layers_to_transform, self.layers_pattern)
        return True

    def targets_parameter(self, path: str) -> bool:
        """Tell whether the parameter at ``path``, a module's path and a name, gets an update of its own."""
        return names_parameter(path, self.target_parameters)

    def saves(self, path: str) -> bool:
        """Tell whether the module at ``path`` is trained and saved whole, by ``modules_to_save``.

        As PEFT reads it, a name is the end of a path, whole components or not: ``head`` saves ``lm_head``.
        """
        return saved(path, self.modules_to_save)

    def token_indices_of(self, path: str) -> tuple[int, ...] | None:
        """Return the tokens whose rows are trained of the embedding at ``path``, or None where none are.

        Without names they are those of the model's input embedding, which only the model knows; then every
        path has them, as far as names can tell.
        """
        tokens = self.trainable_token_indices
        if not isinstance(tokens, Mapping):
            return tokens
        return next((own for name, own in tokens.items() if path.endswith(name)), None)

    @property
    def names_all_linear(self) -> bool:
        """Whether ``target_modules`` is the word for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    @property
    def names_attention(self) -> bool:
        """Whether ``target_modules`` is the word for the projections of the attention."""
        return self.target_modules == ATTENTION

    @property
    def changes_base(self) -> bool:
        """Whether the adapter belongs to a base from which its start was taken away (PiSSA, OLoRA)."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower() in BASE_CHANGING

    def rank_of(self, path: str) -> int:
        """Return the rank of the module or parameter: from ``rank_pattern``, else ``r``."""
        return pattern_value(path, self.rank_pattern, self.r)

    def alpha_of(self, path: str) -> float:
        """Return alpha of the module or parameter: from ``alpha_pattern``, else ``lora_alpha``."""
        return pattern_value(path, self.alpha_pattern, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return alpha / r of the module or parameter, or alpha / sqrt(r) with ``use_rslora``; float64."""
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
                raise wrong("peft_type", f"{PEFT_TYPE!r}", peft_type)
            known = {entry.name for entry in fields(cls)}
            for key, value in mapping.items():
                if key in NEUTRAL:
                    require_neutral(key, value)
                elif not (key in known or key in INERT or key == "peft_type" or is_neutral(key, value)):
                    raise ConfigError(
                        f"{key}: unknown key with value {short(value)}; it may change the mathematics, "
                        f"so remove it only if you know that it does not"
                    )
            given = {key: value for key, value in mapping.items() if key in known}
            for name in ("rank_pattern", "alpha_pattern"):
                if given.get(name, {}) is None:
                    del given[name]
            given.setdefault("task_type", None)
            return cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of an ``adapter_config.json`` that PEFT reads back with the same meaning.

        Raises:
            ConfigError: ``target_modules`` is still the word ``"attention"``, which PEFT would take for an
                expression.
        """
        if self.names_attention:
            raise ConfigError(
                f"target_modules: expected names, got the word {ATTENTION!r}, which PEFT has not; resolve it "
                f"against the model first"
            )
        own = {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}
        return {"peft_type": PEFT_TYPE, "inference_mode": True, **own}

    def _set(self, name: str, value: object) -> None:
        """Put a checked value in place of the one given; for ``__post_init__`` alone."""
        object.__setattr__(self, name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
