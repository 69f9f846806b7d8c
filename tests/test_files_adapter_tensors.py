"""A file's keys taken apart into pairs, whole tensors and rows, and put together again."""

import re
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Array, random_array

from loracle.files import LoraConfig, LoraPair
from loracle.files.adapter_tensors import ParsedArrays, arrays_by_key, parse_arrays
from loracle.reference import FileError

P = "base_model.model."
A, B = random_array((2, 6), 0), random_array((8, 2), 1)
TWICE = "PEFT writes that where a layer is adapted twice: train the adapter with one target for it"


def config_of(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ("q",), **options})


def parsed(config: LoraConfig, **arrays: Array) -> ParsedArrays:
    """Of arrays under their keys without the prefix, `__` for a dot."""
    return parse_arrays(config, {P + key.replace("__", "."): array for key, array in arrays.items()})


def refusal(message: str) -> Any:
    return pytest.raises(FileError, match=f"^{re.escape(message)}$")


def pair(path: str = "q", **more: Array) -> dict[str, Array]:
    return {f"{path}__lora_A__weight": A, f"{path}__lora_B__weight": B, **more}


def only(found: ParsedArrays) -> tuple[str, LoraPair]:
    assert not found.tensors
    assert not found.tokens
    ((path, own),) = found.pairs.items()
    return path, own


def test_a_linear_pair_with_all_its_parts() -> None:
    bias, magnitude = np.ones(8, np.float32), np.full(8, 2, np.float32)
    arrays = pair("m__q", m__q__lora_B__bias=bias, m__q__lora_magnitude_vector=magnitude)
    path, own = only(parsed(config_of(), **arrays))
    assert (path, own.kind, own.scaling) == ("m.q", "linear", 3.0)
    expected = {"A": A, "B": B, "bias": bias, "magnitude": magnitude}
    for part, array in expected.items():
        assert np.array_equal(getattr(own, part), array)
        assert not np.shares_memory(getattr(own, part), array)
    _, plain = only(parsed(config_of(), **pair()))
    assert plain.bias is None
    assert plain.magnitude is None


def test_an_embedding_and_convolutions() -> None:
    path, own = only(parsed(config_of(), m__e__lora_embedding_A=A, m__e__lora_embedding_B=B))
    assert (path, own.kind) == ("m.e", "embedding")
    assert np.array_equal(own.A, A)
    assert np.array_equal(own.B, B)
    for axes in (1, 2, 3):
        taps = (..., *[None] * axes)
        kernel = {"q__lora_A__weight": A[taps], "q__lora_B__weight": B[taps]}
        assert only(parsed(config_of(), **kernel))[1].kind == "convolution"


def test_scalings_are_the_configuration_s_for_each_path() -> None:
    config = config_of(alpha_pattern={"m.q": 8}, target_modules=("q", "k"))
    found = parsed(config, **pair("m__q"), **pair("m__k"))
    assert {path: own.scaling for path, own in found.pairs.items()} == {"m.k": 3.0, "m.q": 4.0}
    assert list(found.pairs) == ["m.k", "m.q"]


def test_stacked_parameters() -> None:
    both = config_of(target_modules=None, target_parameters=("e.x", "e.y"))
    found = parsed(both, **pair("m__e"), **pair("m__e__base_layer"))
    kinds = {path: own.kind for path, own in found.pairs.items()}
    assert kinds == {"m.e": "parameter", "m.e.base_layer": "parameter"}
    # One alone is a parameter's where a name with a dot is its module's, or the module is no target.
    for config, path, kind in (
        (config_of(target_parameters=("q.x",)), "m__q", "parameter"),
        (config_of(target_parameters=("x",)), "m__q", "linear"),
        (config_of(target_parameters=("x",)), "m__k", "parameter"),
        (config_of(target_parameters=("k.x",)), "m__q", "linear"),
        (config_of(target_parameters=("k.x", "x")), "m__q", "linear"),
    ):
        assert only(parsed(config, **pair(path)))[1].kind == kind
    # A wrapper says it, whatever the names.
    inner = config_of(target_modules=("q",), target_parameters=("x", "y"))
    found = parsed(inner, **pair("m__q"), **pair("m__q__base_layer"))
    assert {own.kind for own in found.pairs.values()} == {"parameter"}
    message = (
        f"tensor {P}m.q.lora_A.weight is of a parameter of m.q, which target_parameters ('k.x',) do not "
        "name; config and weights are of different adapters"
    )
    with refusal(message):
        parsed(config_of(target_parameters=("k.x",)), **pair("m__q"), **pair("m__q__base_layer"))


def test_whole_tensors_and_rows_of_tokens() -> None:
    weight, rows = random_array((3, 6), 5), random_array((1, 6), 6)
    found = parsed(
        config_of(),
        **pair("m__q"),
        m__q__base_layer__bias=weight,
        e__token_adapter__base_layer__weight=weight,
        e__token_adapter__trainable_tokens_delta=rows,
    )
    assert list(found.pairs) == ["m.q"]
    assert list(found.tensors) == ["e.weight", "m.q.bias"]
    assert list(found.tokens) == ["e"]
    for own, given in ((found.tensors["m.q.bias"], weight), (found.tokens["e"], rows)):
        assert np.array_equal(own, given)
        assert not np.shares_memory(own, given)


def test_a_module_with_rows_and_a_pair_has_both() -> None:
    found = parsed(config_of(), **pair("e"), e__token_adapter__trainable_tokens_delta=A)
    assert (list(found.pairs), list(found.tokens)) == (["e"], ["e"])


SAVED = config_of(modules_to_save=("head",))


def test_what_a_saved_module_s_wrapper_repeats_is_left_out() -> None:
    ones = np.ones(3, np.float32)
    found = parsed(
        SAVED,
        **pair(),
        head__bias=ones,
        head__modules_to_save__bias=ones.copy(),
        head__original_module__bias=ones * 2,
        zz__weight=ones,
    )
    assert list(found.tensors) == ["head.bias", "zz.weight"]
    assert np.array_equal(found.tensors["head.bias"], ones)
    # Of a module that is not saved it is a name like any other.
    other = parsed(config_of(), **pair(), head__original_module__bias=ones)
    assert list(other.tensors) == ["head.original_module.bias"]


@pytest.mark.parametrize("trained", [None, np.zeros(3, np.float32)], ids=["absent", "other numbers"])
def test_a_repetition_of_other_numbers_is_refused(trained: Array | None) -> None:
    more = {} if trained is None else {"head__bias": trained}
    message = (
        f"tensor {P}head.modules_to_save.bias is not understood, expected the same numbers as {P}head.bias; "
        "save the adapter again with PEFT"
    )
    with refusal(message):
        parsed(SAVED, **pair(), **more, head__modules_to_save__bias=np.ones(3, np.float32))


def test_missing_parts() -> None:
    for part in ("lora_A__weight", "lora_B__weight"):
        left = {key: own for key, own in pair().items() if not key.endswith(part)}
        with refusal(f"{P}q.{part.replace('__', '.')} is missing; was the copy complete?"):
            parsed(config_of(), **left)
    for own, other in (("A", "B"), ("B", "A")):
        with refusal(f"{P}e.lora_embedding_{other} is missing; was the copy complete?"):
            parsed(config_of(), **{f"e__lora_embedding_{own}": A})


def test_two_tensors_for_one_are_refused() -> None:
    embedding = {"q__lora_embedding_A": A, "q__lora_embedding_B": B}
    for part in ("A", "B"):
        given = {**embedding, f"q__lora_{part}__weight": A}
        with refusal(f"{P}q.lora_{part}.weight and {P}q.lora_embedding_{part} are both of q; {TWICE}"):
            parsed(config_of(), **given)
    config = config_of(target_modules=("q", "out_proj"))
    given = {**pair("q"), **pair("q__out_proj"), **pair("q__base_layer__out_proj")}
    with refusal(f"{P}q.base_layer.out_proj and {P}q.out_proj are both of q.out_proj; {TWICE}"):
        parsed(config, **given)
    with refusal(f"{P}q.base_layer.bias and {P}q.bias are both of q.bias; {TWICE}"):
        parsed(config_of(), **pair(), q__base_layer__bias=A, q__bias=B)


def test_keys_that_are_not_understood() -> None:
    key = f"{P}q.lora_A.mine.weight"
    message = (
        f"tensor {key} is not understood: 'mine' is an adapter's name, as in a model's own state dict; "
        "save it with PEFT's save_pretrained"
    )
    with refusal(message):
        parse_arrays(config_of(), {key: A})
    message = (
        f"tensor q.weight is not understood, expected {P}<module>.lora_A.weight, .lora_B.weight and the "
        "like; is it of a variant of LoRA?"
    )
    with refusal(message):
        parse_arrays(config_of(), {"q.weight": A})


def test_arrays_have_their_keys_and_the_library_s_order() -> None:
    ones = np.ones(8, np.float32)
    config = config_of(target_parameters=("e.x", "e.y"), bias="all")
    pairs = {
        "m.q": LoraPair(A, B, 3.0, bias=ones, magnitude=ones),
        "m.w": LoraPair(A, B, 3.0, "embedding"),
        "m.e.x": LoraPair(A, B, 3.0, "parameter"),
        "m.e.y": LoraPair(A, B, 3.0, "parameter"),
    }
    tensors = {
        "m.q.bias": np.ones(2, BFLOAT16),
        "t.bias": np.ones(2, np.float64),
        "m.e.bias": np.ones(2, np.int64),
        "a.bias": np.ones(2, np.bool_),
    }
    found = arrays_by_key(config, pairs, tensors, {"t": np.ones((1, 2), np.float16)})
    assert list(found) == [
        P + key
        for key in (
            "m.e.base_layer.base_layer.bias",
            "t.token_adapter.base_layer.bias",
            "m.e.base_layer.lora_A.weight",
            "m.e.base_layer.lora_B.weight",
            "m.e.lora_A.weight",
            "m.e.lora_B.weight",
            "m.q.lora_A.weight",
            "m.q.lora_B.bias",
            "m.q.lora_B.weight",
            "m.q.lora_magnitude_vector",
            "m.w.lora_embedding_A",
            "m.w.lora_embedding_B",
            "m.q.base_layer.bias",
            "t.token_adapter.trainable_tokens_delta",
            "a.bias",
        )
    ]
    assert found[f"{P}m.q.lora_B.bias"] is ones
    assert found[f"{P}m.w.lora_embedding_A"] is A
