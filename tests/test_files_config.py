"""LoraConfig reads what PEFT writes with PEFT's meaning, and refuses what it does not understand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

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
    assert ours & set(NEUTRAL) == {"use_dora", "bias", "fan_in_fan_out"}, (
        "fields that hold their neutral value"
    )


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
    ],
)
def test_what_peft_saves_is_read_and_written_back_with_the_same_meaning(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    import peft

    config = LoraConfig.from_json(_saved_by_peft(tmp_path, **options))
    for key, value in options.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
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
    ],
)
def test_targets(options: dict[str, Any], path: str, expected: bool) -> None:
    assert LoraConfig(**options).targets(path) is expected


SWITCHED_ON: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "bias": "lora_only",
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "kasa_config": {"beta": 1},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "megatron_config": {"tensor_model_parallel_size": 2},
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [5],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
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
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", None),
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
        {"use_dora": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"use_dora": 1},
    ],
)
def test_the_constructor_checks_as_well(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**options)


@pytest.mark.parametrize("name", sorted(BASE_PRESERVING))
def test_initialisations_that_leave_the_base_alone_are_read(name: str) -> None:
    assert LoraConfig.from_json({**MINIMAL, "init_lora_weights": name}).init_lora_weights == name


def test_a_missing_key_is_pefts_default_and_an_empty_pattern_may_be_null() -> None:
    assert LoraConfig.from_json({**MINIMAL, "rank_pattern": None, "alpha_pattern": None}) == LoraConfig(
        task_type=None
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4  # type: ignore[misc]
