"""LoraConfig reads what PEFT writes with PEFT's meaning, and refuses what it does not understand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from refusal import refused

from loracle.files import LoraConfig
from loracle.files.config_keys import BASE_PRESERVING, INERT, NEUTRAL, is_neutral
from loracle.reference import ConfigError

MINIMAL = {"peft_type": "LORA"}
Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


def _saved_by_peft(directory: Path, **options: Any) -> dict[str, Any]:
    import peft

    peft.LoraConfig(**options).save_pretrained(str(directory))
    content: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return content


def test_every_key_of_peft_is_classified_exactly_once() -> None:
    import peft

    ours = {entry.name for entry in dataclasses.fields(LoraConfig)} | {"peft_type"}
    theirs = {entry.name for entry in dataclasses.fields(peft.LoraConfig)}
    assert ours | INERT | set(NEUTRAL) == theirs
    assert not ours & INERT
    assert not INERT & set(NEUTRAL)
    assert not ours & set(NEUTRAL)


def test_neutral_values_and_field_defaults_are_pefts_defaults(tmp_path: Path) -> None:
    saved = _saved_by_peft(tmp_path)
    assert {key: saved[key] for key in NEUTRAL} == dict(NEUTRAL)
    ours = dataclasses.asdict(LoraConfig(task_type=None))
    assert ours == {key: saved[key] for key in ours}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "r": 3, "lora_alpha": 32, "lora_dropout": 0.25},
        {"target_modules": "all-linear", "use_rslora": True, "exclude_modules": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {r"layers\.0.*q_proj": 2},
            "alpha_pattern": {"q_proj": 5},
            "layers_to_transform": [0, 1],
            "layers_pattern": "layers",
            "init_lora_weights": "gaussian",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "somewhere/base",
        },
        {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": [], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 0, 3]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5], "embed_tokens": [9, 1]}},
        {"target_modules": [], "target_parameters": ["mlp.experts.up", "mlp.experts.down"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
        {"target_modules": ["q_proj"], "init_lora_weights": False},
    ],
)
def test_what_peft_saves_is_read_and_written_back_with_the_same_meaning(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    import peft

    config = LoraConfig.from_json(_saved_by_peft(tmp_path, **options))
    for key, value in options.items():
        expected_value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, dict):
            expected_value = {
                name: tuple(own) if isinstance(own, list) else own for name, own in value.items()
            }
        if key == "target_modules" and isinstance(value, list):
            expected_value = tuple(sorted(value))
        assert getattr(config, key) == expected_value
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_json()))
    again = peft.LoraConfig.from_pretrained(str(tmp_path))
    expected = peft.LoraConfig(inference_mode=True, **options)
    assert again == expected
    assert LoraConfig.from_json(config.to_json()).to_json() == config.to_json()


def test_rank_alpha_and_scaling_come_from_the_patterns() -> None:
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.*": 3.5})
    assert (config.rank_of(Q0), config.alpha_of(Q0), config.scaling_of(Q0)) == (2, 8, 4.0)
    assert (config.rank_of(V1), config.alpha_of(V1), config.scaling_of(V1)) == (4, 3.5, 0.875)
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling_of(Q0) == 4.0


@pytest.mark.parametrize(
    ("options", "path", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q0, True),
        ({"target_modules": ["q_proj"]}, V1, False),
        ({"target_modules": None}, V1, True),
        ({"target_modules": "All-Linear"}, V1, True),
        ({"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, V1, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"}, Q0, False),
        ({"target_modules": []}, Q0, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, Q0, False),
        ({"target_modules": [Q0], "layers_to_transform": [1]}, Q0, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layers"]}, Q0, True),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"}, "a.b.0.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "a.b.0.h.1.q", False),
        ({"target_modules": "attention"}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": "attention", "exclude_modules": ["v_proj"]}, V1, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, Q0, False),
        ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, "lm_head", False),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, "lm_head", True),
        ({"target_parameters": ["experts.up"]}, Q0, False),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.up"]}, Q0, True),
    ],
)
def test_targets(options: dict[str, Any], path: str, expected: bool) -> None:
    assert LoraConfig(**options).targets(path) is expected


SWITCHED_ON: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
}


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_key_that_changes_the_mathematics_is_refused_by_name_unless_neutral(key: str) -> None:
    assert LoraConfig.from_json({**MINIMAL, key: NEUTRAL[key]}) == LoraConfig.from_json(MINIMAL)
    with pytest.raises(ConfigError, match=f"^here: {key}: .*changes the mathematics"):
        LoraConfig.from_json({**MINIMAL, key: SWITCHED_ON[key]}, "here")


@pytest.mark.parametrize("value", [1, 0, True, "x", [0], {"a": None}, 0.0])
def test_an_unknown_key_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^adapter_config\.json: use_magic: unknown key"):
        LoraConfig.from_json({**MINIMAL, "use_magic": value})


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_key_that_is_switched_off_is_tolerated(value: Any) -> None:
    assert is_neutral("use_magic", value)
    assert LoraConfig.from_json({**MINIMAL, "use_magic": value}) == LoraConfig.from_json(MINIMAL)


@pytest.mark.parametrize("key", sorted(INERT))
def test_inert_keys_are_dropped(key: str) -> None:
    assert LoraConfig.from_json({**MINIMAL, key: "anything"}) == LoraConfig.from_json(MINIMAL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", None),
        ("use_rslora", 1),
        ("use_rslora", None),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("target_modules", "(q"),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", [None]),
        ("layers_to_transform", [True]),
        ("layers_to_transform", "0"),
        ("layers_to_transform", True),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"(q": 1}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("alpha_pattern", {"q_proj": None}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "magic"),
        ("init_lora_weights", ["pissa"]),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", None),
        ("use_dora", None),
        ("use_dora", 1),
        ("lora_bias", "yes"),
        ("fan_in_fan_out", 0),
        ("ensure_weight_tying", None),
        ("bias", None),
        ("bias", True),
        ("bias", ["all"]),
        ("bias", "some"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["lm_head", 1]),
        ("modules_to_save", ["lm_head", ""]),
        ("modules_to_save", ["(head"]),
        ("target_parameters", "experts.up"),
        ("target_parameters", [""]),
        ("trainable_token_indices", 5),
        ("trainable_token_indices", "5"),
        ("trainable_token_indices", [1, -1]),
        ("trainable_token_indices", [1.0]),
        ("trainable_token_indices", [True]),
        ("trainable_token_indices", [3, 1, 3]),
        ("trainable_token_indices", {"": [1]}),
        ("trainable_token_indices", {"embed_tokens": [2, 2]}),
        ("trainable_token_indices", {"embed_tokens": None}),
        ("base_model_name_or_path", 1),
        ("task_type", ["CAUSAL_LM"]),
        ("peft_type", "IA3"),
        ("peft_type", None),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_json({**MINIMAL, key: value})
    message = str(caught.value)
    assert message.startswith("adapter_config.json: ")
    assert key in message or "module pattern" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ".*", "layers_to_transform": 0},
        {"target_modules": ["q"], "layers_pattern": "layers"},
        {"bias": "both"},
        {"use_dora": 1},
    ],
)
def test_the_constructor_checks_as_well(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**options)


PARAMETERS = {"target_parameters": ("experts.up",)}
REMEDY = "; correct the adapter's config"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_bias": True, "use_dora": True},
            f"lora_bias: expected false beside use_dora, which rescales no bias, got True{REMEDY}",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "pissa"},
            f"init_lora_weights: expected true or false beside lora_bias, got 'pissa'{REMEDY}",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "gaussian"},
            f"init_lora_weights: expected true or false beside lora_bias, got 'gaussian'{REMEDY}",
        ),
        (
            {**PARAMETERS, "lora_dropout": 0.1},
            f"lora_dropout: expected 0 beside target_parameters, whose input no layer sees, got 0.1{REMEDY}",
        ),
        (
            {**PARAMETERS, "lora_bias": True},
            f"lora_bias: expected false beside target_parameters, got True{REMEDY}",
        ),
        (
            {**PARAMETERS, "use_dora": True},
            f"use_dora: expected false beside target_parameters, got True{REMEDY}",
        ),
        (
            {**PARAMETERS, "fan_in_fan_out": True},
            f"fan_in_fan_out: expected false beside target_parameters, got True{REMEDY}",
        ),
        (
            {"modules_to_save": ("lm_head",), "trainable_token_indices": {"lm_head": (1,)}},
            f"trainable_token_indices: expected embeddings that modules_to_save does not train whole, "
            f"got 'lm_head'{REMEDY}",
        ),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights: 'pissa_niter_16' changes the base weights by a randomised approximation, "
            "which nothing can do again; train with 'pissa', or convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        ),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights: 'corda' changes the base weights and is not supported, expected true, false "
            "or one of eva, gaussian, mica, olora, orthogonal, pissa; convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        ),
    ],
)
def test_values_without_a_meaning_together_are_refused(options: dict[str, Any], message: str) -> None:
    refused(lambda: LoraConfig(**options), ConfigError, message)


def test_no_target_parameters_take_nothing_away() -> None:
    assert LoraConfig(target_parameters=(), lora_dropout=0.1, use_dora=True).use_dora


@pytest.mark.parametrize("name", sorted(BASE_PRESERVING))
def test_initialisations_that_leave_the_base_alone_are_read(name: str) -> None:
    assert LoraConfig.from_json({**MINIMAL, "init_lora_weights": name}).init_lora_weights == name


def test_a_missing_key_is_pefts_default_and_an_empty_pattern_may_be_null() -> None:
    assert LoraConfig.from_json({**MINIMAL, "rank_pattern": None, "alpha_pattern": None}) == LoraConfig(
        task_type=None
    )


@pytest.mark.parametrize(
    ("name", "changes"), [("pissa", True), ("OLoRA", True), ("gaussian", False), (True, False)]
)
def test_which_initialisations_change_the_base(name: bool | str, changes: bool) -> None:
    assert LoraConfig(init_lora_weights=name).changes_base is changes


def test_parameters_are_named_by_their_path_or_its_end() -> None:
    config = LoraConfig(
        r=4, target_parameters=("experts.up", "a.b"), rank_pattern={"experts.up": 2}, alpha_pattern={"up": 6}
    )
    for path, expected in {
        "layers.0.experts.up": True,
        "experts.up": True,
        "a.b": True,
        "xexperts.up": False,
        "layers.0.experts": False,
        "layers.0.experts.up.weight": False,
    }.items():
        assert config.targets_parameter(path) is expected, path
    assert not LoraConfig().targets_parameter("experts.up")
    assert config.rank_of("layers.0.experts.up") == 2
    assert config.scaling_of("layers.0.experts.up") == 3.0
    assert config.scaling_of("layers.0.experts.down") == 2.0


def test_saved_modules_and_trained_tokens_are_named_by_the_end_of_their_path() -> None:
    config = LoraConfig(
        modules_to_save=("score", "norm"), trainable_token_indices={"embed_tokens": (4, 1), "lm_head": (2,)}
    )
    assert config.saves("score")
    assert config.saves("model.input_layernorm")
    assert not config.saves("score.weight")
    assert not LoraConfig().saves("score")
    assert config.token_indices_of("model.embed_tokens") == (4, 1)
    assert config.token_indices_of("lm_head") == (2,)
    assert config.token_indices_of("model.embed") is None
    assert LoraConfig().token_indices_of("model.embed_tokens") is None
    assert LoraConfig(trainable_token_indices=(3, 0)).token_indices_of("anything") == (3, 0)


def test_the_word_attention_is_resolved_before_peft_sees_it() -> None:
    assert LoraConfig(target_modules="attention").names_attention
    assert not LoraConfig(target_modules=("attention",)).names_attention
    refused(
        LoraConfig(target_modules="attention").to_json,
        ConfigError,
        "target_modules: expected names, got the word 'attention', which PEFT has not; resolve it against "
        "the model first",
    )


def test_module_names_are_a_set() -> None:
    assert LoraConfig(target_modules=("v", "q", "v")) == LoraConfig(target_modules=("q", "v"))
    assert LoraConfig(target_modules=("v", "q")).to_json()["target_modules"] == ["q", "v"]


def test_a_configuration_is_immutable_hashable_and_independent_of_its_arguments() -> None:
    names, pattern = ["q_proj"], {"q_proj": 2}
    config = LoraConfig(target_modules=names, rank_pattern=pattern)  # type: ignore[arg-type]
    names.append("v_proj")
    pattern["v_proj"] = 3
    assert config == LoraConfig(target_modules=("q_proj",), rank_pattern={"q_proj": 2})
    assert hash(config) == hash(LoraConfig(target_modules=("q_proj",), rank_pattern={"q_proj": 2}))
    tokens = {"lm_head": [3]}
    config = LoraConfig(trainable_token_indices=tokens)  # type: ignore[arg-type]
    tokens["lm_head"].append(4)
    assert config.trainable_token_indices == {"lm_head": (3,)}
    assert hash(config) == hash(LoraConfig(trainable_token_indices={"lm_head": (3,)}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4  # type: ignore[misc]
