"""What an adapter holds must be what its configuration says: everything else is refused, in full words."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Array, random_array

from loracle.files import LoraConfig, LoraPair
from loracle.files.adapter_checks import (
    check_pairs,
    check_tensors,
    check_tokens,
    holds_parameter,
    module_targeted,
    wrappers_of,
)
from loracle.files.lora_pair import check_finite
from loracle.reference import DTypeError, LoracleError, NonFiniteError, ShapeError, TargetError

OTHER = "config and weights are of different adapters"
P = "base_model.model."
ONES = np.ones(8, np.float32)


def config_of(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ("q",), **options})


def pair_of(kind: str = "linear", seed: int = 0, **changed: Any) -> LoraPair:
    given = {"A": random_array((2, 6), seed), "B": random_array((8, 2), seed + 1), "scaling": 3.0}
    return LoraPair(**{**given, "kind": kind, **changed})


def pairs_checked(config: LoraConfig, pairs: Mapping[str, LoraPair]) -> None:
    check_pairs(config, pairs, wrappers_of(config, pairs))


def tensors_checked(
    config: LoraConfig,
    tensors: Mapping[str, Array],
    pairs: Mapping[str, LoraPair] | None = None,
    tokens: Mapping[str, Array] | None = None,
) -> None:
    own = {"m.q": pair_of()} if pairs is None else pairs
    check_tensors(config, tensors, own, tokens or {}, wrappers_of(config, own))


def refusal(message: str, error: type[LoracleError] = TargetError) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


STACKED = config_of(target_modules=None, target_parameters=("e.x", "e.y"))
UNNAMED = config_of(target_modules=("q",), target_parameters=("e.x", "e.y"))


def test_pairs_that_are_targeted() -> None:
    pairs_checked(config_of(), {"m.q": pair_of(), "q": pair_of("embedding")})
    pairs_checked(config_of(target_modules=("attn",)), {"m.attn.out_proj": pair_of(), "m.attn": pair_of()})
    pairs_checked(STACKED, {"m.e.x": pair_of("parameter"), "m.e.y": pair_of("parameter")})
    pairs_checked(UNNAMED, {"m.e.base_layer": pair_of("parameter"), "m.e": pair_of("parameter")})
    pairs_checked(
        config_of(rank_pattern={"q": 1}), {"q": pair_of(A=ONES[None], B=ONES[:, None], scaling=6.0)}
    )


def test_where_the_pairs_lie() -> None:
    pairs = {"m.q": pair_of(), "m.e.x": pair_of("parameter"), "m.e.y": pair_of("parameter")}
    wrappers = wrappers_of(STACKED, pairs)
    assert wrappers.paths == {"m.q": "m.q", "m.e.x": "m.e.base_layer", "m.e.y": "m.e"}
    assert wrappers.depths == {"m.q": 1, "m.e": 2}


def test_a_module_that_is_not_targeted() -> None:
    with refusal(
        f"{P}m.k.lora_A.weight: module m.k is not targeted by the adapter's config (target_modules ('q',)); "
        f"{OTHER}"
    ):
        pairs_checked(config_of(), {"m.q": pair_of(), "m.k": pair_of()})
    with refusal(
        f"{P}m.k.lora_embedding_A: module m.k is not targeted by the adapter's config (target_modules "
        f"('q',), target_parameters ('e.x', 'e.y')); {OTHER}"
    ):
        pairs_checked(UNNAMED, {"m.k": pair_of("embedding")})


def test_a_parameter_that_is_not_targeted() -> None:
    for config, path in ((config_of(), "m.q"), (UNNAMED, "m.f"), (UNNAMED, "m.xe")):
        said = "" if config.target_parameters is None else ", target_parameters ('e.x', 'e.y')"
        with refusal(
            f"{P}{path}.lora_A.weight: parameter {path} is not targeted by the adapter's config "
            f"(target_modules ('q',){said}); {OTHER}"
        ):
            pairs_checked(config, {path: pair_of("parameter")})
    # A module's name does not make a target of its parameter.
    with pytest.raises(TargetError, match=r"module m\.e\.x is not targeted"):
        pairs_checked(STACKED, {"m.e.x": pair_of()})


def test_arrays_are_named_as_in_the_file() -> None:
    def first(kind: str, config: LoraConfig, **changed: Any) -> str:
        with pytest.raises(LoracleError) as caught:
            pairs_checked(config, {"m.q": pair_of(kind, **changed)})
        return str(caught.value).partition(": ")[0]

    assert first("linear", config_of(), A=ONES) == f"{P}m.q.lora_A.weight"
    assert first("linear", config_of(), B=ONES) == f"{P}m.q.lora_B.weight"
    assert first("embedding", config_of(), A=ONES) == f"{P}m.q.lora_embedding_A"
    assert first("embedding", config_of(), B=ONES) == f"{P}m.q.lora_embedding_B"
    assert first("embedding", config_of(use_dora=True)) == f"{P}m.q.lora_magnitude_vector"
    assert first("linear", config_of(lora_bias=True)) == f"{P}m.q.lora_B.bias"
    assert first("linear", config_of(), scaling=1.0) == "m.q"


def test_a_rank_is_held_against_the_configuration_unless_nobody_has_said_whose_it_is() -> None:
    wide = {"A": random_array((9, 6), 0), "B": random_array((8, 9), 1)}
    with pytest.raises(ShapeError, match=r"expected shape \(2, in\)"):
        pairs_checked(config_of(), {"q": pair_of(**wide)})
    with pytest.raises(ShapeError, match=r"expected shape \(2 \* weights, in\)"):
        pairs_checked(UNNAMED, {"m.e": pair_of("parameter", **wide)})
    pattern = config_of(target_parameters=("e.x",), rank_pattern={"e.x": 3})
    pairs_checked(pattern, {"m.e": pair_of("parameter", **wide)})
    with pytest.raises(ShapeError, match=r"expected shape \(2, in\)"):
        pairs_checked(pattern, {"q": pair_of(**wide)})
    named = {"m.e.x": pair_of("parameter", scaling=2.0, **wide)}
    pairs_checked(pattern, named)
    with pytest.raises(ShapeError, match=r"expected shape \(3 \* weights, in\)"):
        pairs_checked(pattern, {"m.e.x": pair_of("parameter", scaling=2.0)})


def test_stacked_parameters_of_one_module() -> None:
    own = pair_of("parameter")
    with refusal("m.e: has an update of its own and of its parameter m.e.x; target one of them"):
        pairs_checked(
            config_of(target_modules=("e",), target_parameters=("e.x",)), {"m.e": pair_of(), "m.e.x": own}
        )
    both = {"m.e.x": own, "m.e": own}
    with refusal("m.e: m.e.x, m.e are parameters with and without their names; name all of them"):
        pairs_checked(UNNAMED, both)
    expected = f"{P}m.e.lora_A.weight: expected a wrapper within each of 2 at m.e, got base_layer"
    with refusal(f"{P}m.e.base_layer.lora_A.weight: expected a wrapper within each of 1 at m.e, got "
                 "base_layer 1 times; was the copy complete?"):  # fmt: skip
        pairs_checked(UNNAMED, {"m.e.base_layer": own})
    with refusal(f"{expected} 0, 2 times; was the copy complete?"):
        pairs_checked(UNNAMED, {"m.e": own, "m.e.base_layer.base_layer": own})
    pairs_checked(UNNAMED, {"m.e.base_layer.base_layer": own, "m.e": own, "m.e.base_layer": own})


def test_an_output_layer_may_have_the_update_of_the_embedding_that_it_is_tied_to() -> None:
    tied = config_of(ensure_weight_tying=True)
    embedding = pair_of("embedding")
    head = pair_of(A=embedding.B.T, B=embedding.A.T)
    pairs_checked(tied, {"m.q": embedding, "head": head})
    with pytest.raises(TargetError, match="module head is not targeted"):
        pairs_checked(config_of(), {"m.q": embedding, "head": head})
    wrong: list[dict[str, LoraPair]] = [
        {"m.q": embedding, "head": pair_of(A=embedding.B.T + 1, B=embedding.A.T)},
        {"m.q": embedding, "head": pair_of(A=embedding.B.T, B=embedding.A.T + 1)},
        {"m.q": pair_of(A=embedding.A, B=embedding.B), "head": head},
        {"m.q": embedding, "head": pair_of("embedding", A=embedding.A, B=embedding.B)},
        {"m.q": pair_of(seed=4), "head": head},
    ]
    for pairs in wrong:
        with pytest.raises(TargetError, match="module head is not targeted"):
            pairs_checked(tied, pairs)
    with pytest.raises(TargetError, match="is not targeted"):
        pairs_checked(tied, {"m.q": pair_of(seed=4), "other": embedding, "head": head})


@pytest.mark.parametrize(
    ("path", "targeted"),
    [
        ("m.q", True),
        ("m.q.out_proj", True),
        ("m.q.k", False),
        ("m.k.out_proj", False),
        ("q", True),
        ("k", False),
    ],
)
def test_a_module_is_targeted_by_its_name_or_its_attention_s(path: str, targeted: bool) -> None:
    assert module_targeted(config_of(), path) is targeted


@pytest.mark.parametrize(
    ("module", "name", "held"),
    [
        ("m.e", "x", True),
        ("m.e", "e.x", True),
        ("e", "e.x", True),
        ("m.e", "m.e.x", True),
        ("m.fe", "e.x", False),
        ("m.f", "e.x", False),
    ],
)
def test_a_parameter_s_name_may_say_its_module(module: str, name: str, held: bool) -> None:
    assert holds_parameter(module, name) is held


EMBEDDING_PAIR = {"m.q": pair_of("embedding")}
BELONGING: list[tuple[dict[str, Any], str, bool]] = [
    ({"bias": "all"}, "m.k.bias", True),
    ({"bias": "all"}, "m.k.weight", False),
    ({"bias": "all"}, "m.k.my_bias", False),
    ({"bias": "lora_only"}, "m.q.bias", True),
    ({"bias": "lora_only"}, "m.k.bias", False),
    ({"bias": "none"}, "m.q.bias", False),
    ({"modules_to_save": ("head",)}, "m.head.weight", True),
    ({"modules_to_save": ("head",)}, "m.head.dense.out.weight", True),
    ({"modules_to_save": ("head",)}, "head.anything", True),
    ({"modules_to_save": ("head",)}, "m.weight", False),
    ({"modules_to_save": ("head",)}, "head", False),
    ({}, "m.q.weight", False),
    ({}, "m.embed_tokens.weight", True),
    ({}, "lm_head.bias", True),
    ({}, "shared.weight", True),
    ({}, "lm_head.scale", False),
    ({}, "m.embed_tokens.dense.weight", False),
    ({}, "weight", False),
    ({}, "", False),
]


@pytest.mark.parametrize(("options", "name", "belongs"), BELONGING)
def test_which_whole_tensors_belong_to_an_adapter(options: dict[str, Any], name: str, belongs: bool) -> None:
    config = config_of(**options)
    if belongs:
        tensors_checked(config, {name: ONES})
        return
    key = wrappers_of(config, {"m.q": pair_of()}).tensor_key(name, ())
    with refusal(
        f"{key}: lies in no module of modules_to_save {config.modules_to_save!r}, is no bias that bias "
        f"{config.bias!r} trains, and no embedding's weight; {OTHER}"
    ):
        tensors_checked(config, {name: ONES})


def test_of_adapted_embeddings_the_weight_belongs() -> None:
    tensors_checked(config_of(), {"m.q.weight": ONES}, EMBEDDING_PAIR)
    tensors_checked(config_of(), {"wte.weight": ONES}, None, {"wte": ONES})
    rows = {"own": ONES}
    tensors_checked(config_of(), {"own.weight": ONES}, None, rows)
    for name, pairs, tokens in (
        ("m.q.bias", EMBEDDING_PAIR, {}),
        ("own.bias", None, rows),
        ("lm_head.bias", None, {"lm_head": ONES}),
    ):
        with pytest.raises(TargetError, match="lies in no module"):
            tensors_checked(config_of(), {name: ONES}, pairs, tokens)
    with pytest.raises(TargetError, match=rf"^{P}own\.token_adapter\.base_layer\.scale: lies"):
        tensors_checked(config_of(), {"own.scale": ONES}, None, rows)


def test_whole_tensors_have_dtypes_that_files_have_and_are_finite() -> None:
    config = config_of(bias="all")
    for dtype in (np.int64, np.bool_, np.float16, BFLOAT16, np.float64):
        tensors_checked(config, {"x.bias": np.ones(2, dtype)})
    with refusal(f"{P}x.bias: safetensors has no dtype complex64; convert the tensor", DTypeError):
        tensors_checked(config, {"x.bias": np.ones(2, np.complex64)})
    message = "holds NaN or infinity, expected finite numbers; train the adapter again"
    with refusal(f"{P}x.bias: {message}", NonFiniteError):
        tensors_checked(config, {"y.bias": ONES, "x.bias": np.array([1, np.inf], np.float32)})


KEY = f"{P}e.token_adapter.trainable_tokens_delta"
ROWS = np.ones((2, 4), np.float32)
NAMED = {"e": (3, 5)}


@pytest.mark.parametrize(
    ("indices", "tokens"),
    [
        ((3, 5), {"e": ROWS}),
        (NAMED, {"m.e": ROWS}),
        ({"e": (3, 5), "f": (3, 5)}, {"e": ROWS}),
        (None, {}),
    ],
)
def test_rows_of_tokens(indices: Any, tokens: dict[str, Array]) -> None:
    check_tokens(config_of(trainable_token_indices=indices), tokens, {"m.q": pair_of()})


@pytest.mark.parametrize(
    ("indices", "tokens", "error", "message"),
    [
        (None, {"e": ROWS}, TargetError, f"{KEY}: e is not among trainable_token_indices None; {OTHER}"),
        ({"f": (3, 5)}, {"e": ROWS}, TargetError,
         f"{KEY}: e is not among trainable_token_indices {{'f': (3, 5)}}; {OTHER}"),
        ((3, 5), {"m.q": ROWS}, TargetError,
         f"{P}m.q.token_adapter.trainable_tokens_delta: m.q has a lora_A and lora_B too; train rows or an "
         "update, not both"),
        (NAMED, {"e": np.ones((2, 4), int)}, DTypeError,
         f"{KEY}: expected a floating-point dtype, got int64; convert the adapter"),
        *((NAMED, {"e": np.ones(shape, np.float32)}, ShapeError,
           f"{KEY}: expected shape (2, d), a row for each of trainable_token_indices, got {shape}; {OTHER}")
          for shape in ((3, 4), (2,), (2, 4, 1), (2, 0), (1, 4))),
        (NAMED, {"e": np.full((2, 4), np.nan)}, NonFiniteError,
         f"{KEY}: holds NaN or infinity, expected finite numbers; train the adapter again"),
        ((3, 5), {}, TargetError,
         f"{P}<input embedding>.token_adapter.trainable_tokens_delta: expected a row for each of "
         f"trainable_token_indices, got no such tensor; {OTHER}"),
        ({"e": (3, 5), "f": (4,)}, {"e": ROWS}, TargetError,
         f"{P}f.token_adapter.trainable_tokens_delta: expected a row for each of trainable_token_indices, "
         f"got no such tensor; {OTHER}"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(
    indices: Any, tokens: dict[str, Array], error: type[LoracleError], message: str
) -> None:
    with refusal(message, error) as caught:
        check_tokens(config_of(trainable_token_indices=indices), tokens, {"m.q": pair_of()})
    assert type(caught.value) is error


@pytest.mark.parametrize("bits", [0x7D00, 0xFD00], ids=hex)
def test_a_signalling_nan_is_refused_without_a_warning(bits: int) -> None:
    array = np.zeros((2, 3), np.uint16)
    array[1, 2] = bits
    with pytest.raises(NonFiniteError, match=r"m\.lora_A: holds NaN"):
        check_finite("m.lora_A", array.view(np.float16))
