"""Each value that a configuration refuses, with the whole line that it is refused with."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from loracle.files import LoraConfig
from loracle.files.config_checks import check_initialisation, short
from loracle.reference import ConfigError

MOST = 2147483647
NAMES = "a list of module names or a string"
LIST = "a list of names or null"
TOKENS = f"numbers of tokens from 0 to {MOST}"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: expected an integer of at least 1, got 0"),
    ({"r": True}, "r: expected an integer of at least 1, got True"),
    ({"r": 2.0}, "r: expected an integer of at least 1, got 2.0"),
    ({"r": MOST + 1}, f"r: expected an integer of at most {MOST}, got {MOST + 1}"),
    ({"lora_alpha": "8"}, "lora_alpha: expected a number, got '8'"),
    ({"lora_alpha": True}, "lora_alpha: expected a number, got True"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number, got 1" + "0" * 76 + "..."),
    ({"lora_dropout": 1.0}, "lora_dropout: expected a probability in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout: expected a probability in [0, 1), got -0.1"),
    ({"lora_dropout": None}, "lora_dropout: expected a number, got None"),
    ({"rank_pattern": []}, "rank_pattern: expected an object of module patterns and numbers, got []"),
    ({"rank_pattern": {3: 4}}, "rank_pattern: expected module patterns as keys, got 3"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: expected an integer of at least 1, got 0"),
    ({"alpha_pattern": "q"}, "alpha_pattern: expected an object of module patterns and numbers, got 'q'"),
    ({"alpha_pattern": {"q": "1"}}, "alpha_pattern['q']: expected a number, got '1'"),
    ({"bias": "some"}, "bias: expected one of 'none', 'all', 'lora_only', got 'some'"),
    ({"task_type": 3}, "task_type: expected a string or null, got 3"),
    ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path: expected a string or null, got ['x']"),
    *(
        ({name: 1}, f"{name}: expected true or false, got 1")
        for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
    ),
    ({"target_modules": 4}, f"target_modules: expected {NAMES}, got 4"),
    ({"target_modules": ["q", 4]}, f"target_modules: expected {NAMES}, got ['q', 4]"),
    ({"exclude_modules": {"q": 1}}, f"exclude_modules: expected {NAMES}, got {{'q': 1}}"),
    ({"layers_pattern": 4}, f"layers_pattern: expected {NAMES}, got 4"),
    ({"modules_to_save": "head"}, f"modules_to_save: expected {LIST}, got None"),
    ({"modules_to_save": [3]}, f"modules_to_save: expected {LIST}, got [3]"),
    ({"modules_to_save": ["head", ""]}, "modules_to_save: expected names that are not empty, got ''"),
    ({"target_parameters": 5}, f"target_parameters: expected {LIST}, got 5"),
    ({"layers_to_transform": [1, "2"]}, "layers_to_transform: expected layer numbers, got [1, '2']"),
    ({"layers_to_transform": True}, "layers_to_transform: expected layer numbers, got True"),
    ({"trainable_token_indices": 5}, f"trainable_token_indices: expected {TOKENS}, got 5"),
    ({"trainable_token_indices": [-1]}, f"trainable_token_indices: expected {TOKENS}, got [-1]"),
    (
        {"trainable_token_indices": [MOST + 1]},
        f"trainable_token_indices: expected {TOKENS}, got [{MOST + 1}]",
    ),
    ({"trainable_token_indices": [True]}, f"trainable_token_indices: expected {TOKENS}, got [True]"),
    ({"trainable_token_indices": [7, 3, 7]}, "trainable_token_indices: expected each token once, got 7"),
    (
        {"trainable_token_indices": {"": [1]}},
        "trainable_token_indices: expected names of embeddings as keys, got ''",
    ),
    (
        {"trainable_token_indices": {4: [1]}},
        "trainable_token_indices: expected names of embeddings as keys, got 4",
    ),
    (
        {"trainable_token_indices": {"e": [2, 2]}},
        "trainable_token_indices['e']: expected each token once, got 2",
    ),
    (
        {"trainable_token_indices": {"e": [2]}, "modules_to_save": ["e"]},
        "trainable_token_indices: expected embeddings that modules_to_save does not train whole, got 'e'",
    ),
    (
        {"target_modules": "q", "layers_to_transform": 3},
        "layers_to_transform: expected null where target_modules is a string, got 3",
    ),
    (
        {"target_modules": "q", "layers_pattern": "h"},
        "layers_pattern: expected null where target_modules is a string, got 'h'",
    ),
    (
        {"target_modules": ["q"], "layers_pattern": "h"},
        "layers_to_transform: expected layer numbers where layers_pattern is given, got None",
    ),
    (
        {"lora_bias": True, "init_lora_weights": "pissa"},
        "init_lora_weights: expected true or false beside lora_bias, got 'pissa'",
    ),
    (
        {"lora_bias": True, "use_dora": True},
        "lora_bias: expected false beside use_dora, which rescales no bias, got True",
    ),
    (
        {"target_parameters": ["w"], "lora_dropout": 0.5},
        "lora_dropout: expected 0 beside target_parameters, whose input no layer sees, got 0.5",
    ),
    *(
        (
            {"target_parameters": ["w"], name: True},
            f"{name}: expected false beside target_parameters, got True",
        )
        for name in ("lora_bias", "use_dora", "fan_in_fan_out")
    ),
]


@pytest.mark.parametrize(("values", "line"), REFUSED, ids=[line[:60] for _, line in REFUSED])
def test_a_wrong_value_is_refused_in_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoraConfig(**values)
    assert str(error.value) == f"{line}; correct the adapter's config"


@pytest.mark.parametrize(
    "values",
    [
        {"r": MOST, "rank_pattern": MappingProxyType({"q": MOST})},
        {"r": 1, "rank_pattern": {"q": 1}},
        {"lora_alpha": -3, "lora_dropout": 0, "alpha_pattern": {"q": 0.5}},
        {"trainable_token_indices": [0, MOST]},
        {"trainable_token_indices": {"e": [2], "f": [2]}, "modules_to_save": ["g"]},
        {"layers_to_transform": 3, "target_modules": ["q"], "layers_pattern": ["h", "h"]},
        {"layers_to_transform": (), "target_modules": {"q"}},
        {"target_modules": "ALL-Linear", "exclude_modules": frozenset({"head"})},
        {"target_parameters": ["w", "v"], "lora_dropout": 0.0},
        {"lora_bias": True, "init_lora_weights": False},
        {"task_type": None, "base_model_name_or_path": None, "bias": "lora_only"},
    ],
    ids=repr,
)
def test_the_ends_of_what_is_allowed_are_allowed(values: dict[str, Any]) -> None:
    LoraConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": "(a+)+$"},
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "(a+)+$"},
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["(a+)+$"]},
    ],
)
def test_an_expression_that_could_take_for_ever_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="may take for ever"):
        LoraConfig(**values)


def test_names_in_a_list_are_no_expressions() -> None:
    LoraConfig(target_modules=["(a+)+$"])


def test_sets_of_names_are_sorted_and_lists_keep_their_order() -> None:
    config = LoraConfig(
        target_modules=["q", "k", "q"],
        layers_to_transform=[2, 1, 2],
        layers_pattern=["h", "g", "h"],
        modules_to_save=["z", "a"],
        rank_pattern={"q": 3},
        alpha_pattern={"k": 5},
        trainable_token_indices=[4, 1],
    )
    assert config.target_modules == ("k", "q")
    assert config.layers_to_transform == (2, 1, 2)
    assert config.layers_pattern == ("h", "g", "h")
    assert config.modules_to_save == ("z", "a")
    assert (config.rank_pattern, config.alpha_pattern) == ({"q": 3}, {"k": 5})
    assert config.trainable_token_indices == (4, 1)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_an_expression_that_is_none_is_refused_where_expressions_are_meant(name: str) -> None:
    with pytest.raises(ConfigError):
        LoraConfig(**{name: "("})


def test_a_name_in_a_list_is_an_expression_for_layers_and_saved_modules_alone() -> None:
    assert LoraConfig(target_modules=["("]).target_modules == ("(",)
    assert LoraConfig(target_parameters=["("]).target_parameters == ("(",)
    with pytest.raises(ConfigError):
        LoraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern=["("])
    with pytest.raises(ConfigError):
        LoraConfig(modules_to_save=["("])


def test_long_values_are_cut_at_eighty() -> None:
    assert short("x" * 78) == repr("x" * 78)
    assert short("x" * 79) == repr("x" * 79)[:77] + "..."
    assert len(short("x" * 200)) == 80


STARTS = "corda, eva, gaussian, loftq, olora, orthogonal, pissa"


@pytest.mark.parametrize("value", ["pissa_niter_4", "PiSSA_niter_16"])
def test_a_start_that_nothing_can_do_again_says_so(value: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_initialisation(value)
    assert str(error.value) == (
        f"init_lora_weights: '{value}' changes the base weights by a randomised approximation, which nothing "
        "can do again; train with 'pissa', or convert the adapter with PEFT's "
        "path_initial_model_for_weight_conversion"
    )


@pytest.mark.parametrize("value", [3, None, "nonsense", ["pissa"]])
def test_an_unknown_start_names_those_that_are_known(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        check_initialisation(value)
    message = str(error.value)
    assert message.startswith(f"init_lora_weights: {value!r} is unknown, expected true, false or one of ")
    assert message.endswith("; correct the adapter's config")
    assert "gaussian" in message
