"""Module names and patterns mean what PEFT says they mean: PEFT itself is asked, and a table of cases."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.files import LoraConfig
from loracle.files.matching import (
    inside_saved,
    layer_selected,
    matches,
    names_parameter,
    pattern_value,
    saved,
)
from loracle.reference import ConfigError

Q0 = "model.layers.0.self_attn.q_proj"

COMPONENTS = ["model", "layers", "h", "0", "1", "11", "self_attn", "q_proj", "v_proj", "xq_proj", "experts"]
PATHS = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=7).map(".".join)
NAMES = st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=3).map(".".join)
EXPRESSIONS = st.sampled_from(
    [
        "q_proj",
        ".*q_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\..*",
        "^model.*",
        r".*layers\.1.*|.*v_proj",
        ".",
    ]
)


@pytest.mark.parametrize(
    ("modules", "path", "expected"),
    [
        (["q_proj"], Q0, True),
        (["self_attn.q_proj"], Q0, True),
        ([Q0], Q0, True),
        (["proj"], Q0, False),
        (["_proj"], Q0, False),
        (["self_attn"], Q0, False),
        (["q.proj"], Q0, False),
        ([], Q0, False),
        (None, Q0, False),
        ("", Q0, False),
        ("q_proj", Q0, False),
        (".*q_proj", Q0, True),
        (".*self_attn", Q0, False),
        ("model.*", Q0, True),
    ],
)
def test_lists_name_whole_trailing_components_and_strings_match_whole_paths(
    modules: Any, path: str, expected: bool
) -> None:
    assert matches(path, modules) is expected


@given(path=PATHS, modules=st.lists(NAMES, min_size=1, max_size=3) | EXPRESSIONS)
def test_matches_is_pefts_target_rule(path: str, modules: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    assert matches(path, modules) == bool(check_target_module_exists(_peft(target_modules=modules), path))


@given(
    path=PATHS,
    layers=st.none() | st.integers(0, 12) | st.lists(st.sampled_from([0, 1, 11]), max_size=2),
    layers_pattern=st.none()
    | st.sampled_from(["layers", "h", "layers|h", r"\w+"])
    | st.just(["h", "layers"]),
)
def test_layer_selection_is_pefts(path: str, layers: Any, layers_pattern: Any) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    path = f"{path}.end"  # named by its suffix, never exactly: an exact name overrides the layers
    config = _peft(target_modules=["end"], layers_to_transform=layers, layers_pattern=layers_pattern)
    assert layer_selected(path, layers, layers_pattern) == bool(check_target_module_exists(config, path))


@pytest.mark.parametrize(
    ("path", "layers", "layers_pattern", "expected"),
    [
        (Q0, 0, None, True),
        (Q0, [1, 2], None, False),
        ("model.layers.1.experts.0.up", [0], None, False),
        ("a.layers.1.h.0.up", 0, "h", True),
        ("lm_head", 0, None, False),
        ("lm_head", [], None, True),
        ("lm_head", None, None, True),
    ],
)
def test_layer_numbers(path: str, layers: Any, layers_pattern: Any, expected: bool) -> None:
    assert layer_selected(path, layers, layers_pattern) is expected


@given(
    path=PATHS,
    modules=st.none() | st.lists(NAMES, max_size=3) | EXPRESSIONS,
    excluded=st.lists(NAMES, max_size=1),
    kept=st.none() | st.lists(NAMES | st.sampled_from(["_proj", "q_proj|v_proj", ".*attn"]), max_size=2),
    parameters=st.none() | st.just(["experts.up"]),
)
def test_a_configuration_targets_what_peft_does(
    path: str, modules: Any, excluded: Any, kept: Any, parameters: Any
) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = LoraConfig(
        target_modules=modules, exclude_modules=excluded, modules_to_save=kept, target_parameters=parameters
    )
    if modules is None and parameters is None:  # PEFT has put the architecture's names there by then
        return
    theirs = _peft(
        target_modules=modules,
        exclude_modules=excluded,
        modules_to_save=kept,
        target_parameters=parameters,
    )
    assert ours.targets(path) is bool(check_target_module_exists(theirs, path))


@pytest.mark.parametrize(
    ("names", "path", "ends", "inside"),
    [
        (["lm_head"], "lm_head", True, True),
        (["head"], "lm_head", True, False),
        (["score"], "model.score", True, True),
        (["self_attn"], Q0, False, True),
        (["self_attn.q_proj"], Q0, True, True),
        (["layers.0"], Q0, False, True),
        ([], Q0, False, False),
        (None, Q0, False, False),
    ],
)
def test_saved_modules(names: Any, path: str, ends: bool, inside: bool) -> None:
    assert saved(path, names) is ends
    assert inside_saved(path, names) is inside


@given(path=PATHS, names=st.none() | st.lists(NAMES, max_size=3))
def test_parameters_are_named_exactly_or_by_their_last_components(path: str, names: Any) -> None:
    components = path.split(".")
    ends = {".".join(components[start:]) for start in range(len(components))}
    assert names_parameter(path, names) == bool(ends & set(names or ()))


PATTERNS = st.dictionaries(NAMES | EXPRESSIONS | st.just("model[0]"), st.integers(1, 64), max_size=4)


@given(path=PATHS | st.just("model[0]"), pattern=PATTERNS)
def test_pattern_values_are_pefts(path: str, pattern: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    assert pattern_value(path, pattern, 99) == pattern.get(get_pattern_key(list(pattern), path), 99)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, 0),
        ({"q_proj": 1}, 1),
        ({"_proj": 1}, 0),
        ({"layers.0.self_attn.q_proj": 1, "q_proj": 2}, 1),
        ({"q_proj": 2, "layers.0.self_attn.q_proj": 1}, 2),
        ({"self_attn": 1}, 0),
        ({r"layers\.\d+\..*": 1}, 1),
        ({"^model.layers.0.*": 1}, 1),
    ],
)
def test_the_first_matching_pattern_counts(pattern: dict[str, int], expected: int) -> None:
    assert pattern_value(Q0, pattern, 0) == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda: matches(Q0, "(q"),
        lambda: layer_selected(Q0, 0, "(h"),
        lambda: pattern_value(Q0, {"*": 1}, 0),
        lambda: inside_saved(Q0, ["(h"]),
    ],
)
def test_a_malformed_expression_is_a_config_error(call: Any) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        call()


def _peft(**given: Any) -> Any:
    neutral: dict[str, Any] = {
        "exclude_modules": None,
        "modules_to_save": None,
        "target_parameters": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return SimpleNamespace(**{**neutral, **given})
