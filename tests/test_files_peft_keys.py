"""Keys of PEFT's files and names in the base model are two spellings of the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.files.peft_keys import (
    Wrappers,
    adapter_name_in,
    copy_in_wrapper,
    split_key,
    unwrap,
    without_base_layers,
    wrap,
)

COMPONENTS = st.sampled_from(["a", "b", "out_proj", "base_layer", "token_adapter", "weight"])
PATHS = st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.a.b.lora_A.weight", ("a.b", "A")),
        ("base_model.model.a.lora_B.bias", ("a", "bias")),
        ("base_model.model.a.lora_embedding_B", ("a", "embedding_B")),
        ("base_model.model.a.token_adapter.trainable_tokens_delta", ("a", "tokens")),
        ("base_model.model.a.weight", ("a.weight", "tensor")),
        ("base_model.model.weight", ("weight", "tensor")),
        ("base_model.model.lora_A.weight", None),
        ("base_model.model.a.lora_C.weight", None),
        ("base_model.model..lora_A.weight", None),
        ("base_model.a.lora_A.weight", None),
        ("base_model.model.", None),
        ("base_model.model..a.weight", None),
    ],
)
def test_a_key_is_a_path_and_a_part(key: str, expected: tuple[str, str] | None) -> None:
    assert split_key(key) == expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("m.lora_A.default.weight", "default"),
        ("m.lora_B.mine.bias", "mine"),
        ("m.lora_embedding_A.mine", "mine"),
        ("m.lora_magnitude_vector.mine", "mine"),
        ("m.lora_magnitude_vector.mine.weight", "mine"),
        ("m.modules_to_save.mine.weight", "mine"),
        ("m.token_adapter.trainable_tokens_delta.mine", "mine"),
        ("m.lora_A.weight", None),
        ("m.lora_B.bias", None),
        ("m.weight", None),
    ],
)
def test_an_adapter_s_name_is_found_in_the_keys_of_a_model(key: str, name: str | None) -> None:
    assert adapter_name_in(key) == name


@pytest.mark.parametrize(
    ("name", "depths", "tokens", "wrapped"),
    [
        ("q.bias", {"q": 1}, (), "q.base_layer.bias"),
        ("mha.out_proj.bias", {"mha": 1, "mha.out_proj": 1}, (), "mha.base_layer.out_proj.base_layer.bias"),
        ("mha.out_proj", {"mha": 1, "mha.out_proj": 1}, (), "mha.base_layer.out_proj"),
        ("e.inner.bias", {"e": 3}, (), "e.base_layer.base_layer.base_layer.inner.bias"),
        ("m.embed.weight", {"m.q": 1}, ("m.embed",), "m.embed.token_adapter.base_layer.weight"),
        ("q.bias", {"p": 1}, (), "q.bias"),
    ],
)
def test_wrappers_lie_around_what_is_in_an_adapted_module(
    name: str, depths: dict[str, int], tokens: tuple[str, ...], wrapped: str
) -> None:
    assert wrap(name, depths, tokens) == wrapped
    wrappers = {
        wrap(path, depths) + ".base_layer" * number
        for path, count in depths.items()
        for number in range(count)
    }
    assert unwrap(wrapped, wrappers, tokens) == (name, 0)


@given(modules=st.sets(PATHS, max_size=3), stacked=st.none() | PATHS, count=st.integers(1, 3), name=PATHS)
def test_unwrapping_undoes_wrapping(modules: set[str], stacked: str | None, count: int, name: str) -> None:
    paths = [] if stacked is None else [f"{stacked}.p{number}" for number in range(count)]
    modules -= {stacked or ""}
    wrappers = Wrappers.of(sorted(modules), paths, lambda _: True)
    known = set(wrappers.paths.values())
    assert len(known) == len(modules) + len(paths)
    for path in modules:
        assert unwrap(wrappers.paths[path], known) == (path, 0)
    for number, path in enumerate(paths):
        assert unwrap(wrappers.paths[path], known) == (stacked, count - 1 - number)
    tensor = f"{name}.bias"
    assert unwrap(wrap(tensor, wrappers.depths), known) == (tensor, 0)


def test_the_first_parameter_lies_innermost() -> None:
    wrappers = Wrappers.of((), ("m.e.x", "m.e.a", "m.e.b"), lambda _: True)
    assert wrappers.key("m.e.x", "A") == "base_model.model.m.e.base_layer.base_layer.lora_A.weight"
    assert wrappers.key("m.e.b", "B") == "base_model.model.m.e.lora_B.weight"
    unnamed = Wrappers.of((), ("m.e", "m.e.base_layer"), lambda _: False)
    assert unnamed.key("m.e.base_layer", "A") == "base_model.model.m.e.base_layer.lora_A.weight"
    assert unnamed.depths == {"m.e": 2}


def test_modules_and_stacked_parameters_of_one_adapter() -> None:
    wrappers = Wrappers.of(("m.q", "m.e.w"), ("m.e.x", "m.e.y"), lambda path: path != "m.q")
    assert wrappers.depths == {"m.q": 1, "m.e.w": 1, "m.e": 2}
    assert wrappers.stacked == {"m.e": ["m.e.x", "m.e.y"]}
    assert wrappers.paths == {
        "m.q": "m.q",
        "m.e.w": "m.e.base_layer.base_layer.w",
        "m.e.x": "m.e.base_layer",
        "m.e.y": "m.e",
    }
    mixed = Wrappers.of((), ("m.f.base_layer", "m.f", "m.e.x"), lambda path: path == "m.e.x")
    assert mixed.paths == {"m.f.base_layer": "m.f.base_layer", "m.f": "m.f", "m.e.x": "m.e"}
    assert mixed.stacked == {"m.f": ["m.f.base_layer", "m.f"], "m.e": ["m.e.x"]}


def test_a_whole_tensor_lies_below_the_wrappers_of_its_module() -> None:
    wrappers = Wrappers.of(("m.q",), (), lambda _: True)
    assert wrappers.tensor_key("m.q.bias", ()) == "base_model.model.m.q.base_layer.bias"
    assert wrappers.tensor_key("m.k.bias", ()) == "base_model.model.m.k.bias"
    key = "base_model.model.m.e.token_adapter.base_layer.weight"
    assert wrappers.tensor_key("m.e.weight", ("m.e",)) == key


def test_wrappers_at_the_end_are_counted_where_pairs_lie_above_them() -> None:
    assert unwrap("a.base_layer.base_layer", ("a", "a.base_layer")) == ("a", 2)
    assert unwrap("a.base_layer.base_layer", ("a.base_layer",)) == ("a.base_layer", 1)
    assert unwrap("a.base_layer", ("b",)) == ("a.base_layer", 0)
    assert unwrap("a", ("",)) == ("a", 0)
    assert unwrap(".base_layer.a.base_layer", (".base_layer.a",)) == (".base_layer.a", 1)


@pytest.mark.parametrize(
    ("path", "stem", "count"),
    [
        ("a", "a", 0),
        ("a.base_layer", "a", 1),
        ("a.base_layer.base_layer", "a", 2),
        (".base_layer.a.base_layer", ".base_layer.a", 1),
        ("a.base_layer.b", "a.base_layer.b", 0),
    ],
)
def test_base_layers_at_the_end_are_taken_off(path: str, stem: str, count: int) -> None:
    assert without_base_layers(path) == (stem, count)


def test_the_first_wrapper_in_a_name_counts() -> None:
    name = "a.modules_to_save.b.modules_to_save.bias"
    assert copy_in_wrapper(name) == ("a", "a.b.modules_to_save.bias", True)


def test_a_saved_module_s_wrapper_is_seen_in_a_name() -> None:
    assert copy_in_wrapper("a.modules_to_save.b.bias") == ("a", "a.b.bias", True)
    assert copy_in_wrapper("a.original_module.bias") == ("a", "a.bias", False)
    assert copy_in_wrapper("a.bias") is None
