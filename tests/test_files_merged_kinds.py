"""Every kind of update is merged as its reference says, in any range of rows, or refused by name."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Q0, V0, Array, random_array, small_adapter, small_tensors, write_model

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair, MergedWeights
from loracle.reference import (
    ConfigError,
    DTypeError,
    LoracleError,
    ShapeError,
    TargetError,
    merge_dora_exact,
    merge_exact,
)

MERGED = (f"{Q0}.weight", f"{V0}.weight")


def _small(path: str, A: Array, B: Array, kind: str = "linear", **options: Any) -> Adapter:
    """An adapter of one pair of rank 2 and scaling 1.5, with a bias or a magnitude where one is given."""
    parts = {name: options.pop(name) for name in ("bias_of_B", "magnitude") if name in options}
    config = LoraConfig(r=2, lora_alpha=3, **options)
    pair = LoraPair(A, B, config.scaling_of(path), kind, parts.get("bias_of_B"), parts.get("magnitude"))
    return Adapter(config, {path: pair})


A6, B8 = random_array((2, 6), 20), random_array((8, 2), 21)
SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (9, 4),
    "turned.weight": (6, 8),
    "conv.weight": (5, 3, 2, 2),
    "mha.in_proj_weight": (8, 6),
    "mha.in_proj_bias": (8,),
    "experts.up": (3, 5, 4),
    "experts.down": (3, 4, 5),
    "experts.square": (3, 4, 4),
    "matrix.weight": (5, 4),
    "straight.weight": (8, 6),
    "straight.bias": (8,),
    "square.weight": (6, 6),
}
BASE: dict[str, Array] = {
    name: random_array(shape, 30 + number).astype(BFLOAT16)
    for number, (name, shape) in enumerate(SHAPES.items())
}


def _experts(A: Array, B: Array, e: int) -> tuple[Array, Array]:
    """One expert's factors in PEFT's layout, entry by entry: row e * r + k of A, column k * E + e of B."""
    r = 2
    own_A = np.array([A[e * r + k] for k in range(r)])
    return own_A, np.array([[row[k * 3 + e] for k in range(r)] for row in B])


STACK_A, STACK_B = random_array((6, 4), 22), random_array((5, 6), 23)
STACKED = {"target_modules": (), "target_parameters": ("experts.up", "experts.down", "matrix.weight")}
CONV_A, CONV_B = random_array((2, 3, 2, 2), 24), random_array((5, 2, 1, 1), 25)
MAGNITUDE = random_array((8,), 26)


def _merge(W: Array, A: Array, B: Array, dtype: Any) -> Array:
    return np.asarray(merge_exact(W, A, B, 1.5, dtype))


def _up(W: Array, dtype: Any) -> Array:
    return np.array([_merge(W[e], *_experts(STACK_A, STACK_B, e), dtype) for e in range(3)])


KINDS: dict[str, tuple[Adapter, str, Any]] = {
    "embedding": (
        _small("embed", random_array((2, 9), 27), random_array((4, 2), 28), "embedding"),
        "embed.weight",
        lambda W, d: _merge(W.T, random_array((2, 9), 27), random_array((4, 2), 28), d).T,
    ),
    "stored (in, out)": (
        _small("turned", A6, B8, fan_in_fan_out=True),
        "turned.weight",
        lambda W, d: _merge(W.T, A6, B8, d).T,
    ),
    "linear beside fan_in_fan_out": (
        _small("straight", A6, B8, fan_in_fan_out=True),
        "straight.weight",
        lambda W, d: _merge(W, A6, B8, d),
    ),
    "square, stored (in, out)": (
        _small("square", A6, B8[:6], fan_in_fan_out=True),
        "square.weight",
        lambda W, d: _merge(W.T, A6, B8[:6], d).T,
    ),
    "convolution": (
        _small("conv", CONV_A, CONV_B, "convolution"),
        "conv.weight",
        lambda W, d: _merge(W.reshape(5, 12), CONV_A.reshape(2, 12), CONV_B.reshape(5, 2), d),
    ),
    "MultiheadAttention": (
        _small("mha", A6, B8),
        "mha.in_proj_weight",
        lambda W, d: _merge(W, A6, B8, d),
    ),
    "experts (E, out, in)": (
        _small("experts.up", STACK_A, STACK_B, "parameter", **STACKED),
        "experts.up",
        _up,
    ),
    "experts (E, in, out)": (
        _small("experts.down", STACK_A, STACK_B, "parameter", **STACKED),
        "experts.down",
        lambda W, d: _up(W.transpose(0, 2, 1), d).transpose(0, 2, 1),
    ),
    "a matrix as a parameter": (
        _small("matrix.weight", STACK_A[:2], STACK_B[:, :2], "parameter", **STACKED),
        "matrix.weight",
        lambda W, d: _merge(W, STACK_A[:2], STACK_B[:, :2], d),
    ),
    "DoRA": (
        _small("straight", A6, B8, use_dora=True, magnitude=MAGNITUDE),
        "straight.weight",
        lambda W, d: merge_dora_exact(W, A6, B8, 1.5, MAGNITUDE, d),
    ),
    "DoRA, convolution": (
        _small(
            "conv", CONV_A, CONV_B, "convolution", use_dora=True, magnitude=MAGNITUDE[:5].reshape(1, 5, 1, 1)
        ),
        "conv.weight",
        lambda W, d: merge_dora_exact(
            W.reshape(5, 12), CONV_A.reshape(2, 12), CONV_B.reshape(5, 2), 1.5, MAGNITUDE[:5], d
        ),
    ),
    "bias of lora_B": (
        _small("straight", A6, B8, lora_bias=True, bias_of_B=MAGNITUDE),
        "straight.bias",
        lambda W, d: _merge(W[:, None], np.ones((1, 1)), MAGNITUDE[:, None], d)[:, 0],
    ),
    "bias of lora_B, MultiheadAttention": (
        _small("mha", A6, B8, lora_bias=True, bias_of_B=MAGNITUDE),
        "mha.in_proj_bias",
        lambda W, d: _merge(W[:, None], np.ones((1, 1)), MAGNITUDE[:, None], d)[:, 0],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [None, np.float32])
def test_each_kind_is_the_exact_value_rounded_once_in_any_range_of_rows(
    tmp_path: Path, kind: str, wanted: Any
) -> None:
    adapter, name, exact = KINDS[kind]
    with Checkpoint(write_model(tmp_path / "m", [BASE])) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert name in merged.merged_names
        assert len(merged.merged_names) == (2 if adapter.config.lora_bias else 1)
        whole = merged.tensor(name, wanted)
        expected = np.asarray(exact(BASE[name], BFLOAT16 if wanted is None else wanted)).reshape(whole.shape)
        assert whole.dtype == expected.dtype
        assert np.ascontiguousarray(whole).tobytes() == np.ascontiguousarray(expected).tobytes()
        for start, stop in ((0, 1), (1, 3), (len(whole) - 1, len(whole))):
            part = np.ascontiguousarray(merged.rows(name, start, stop, wanted))
            assert part.tobytes() == np.ascontiguousarray(whole[start:stop]).tobytes()


def _beside(tensors: dict[str, Array], tokens: dict[str, Array] | None = None, **options: Any) -> Adapter:
    """The small adapter with whole tensors and trained rows beside its pairs."""
    own = small_adapter()
    return Adapter(replace(own.config, **options), own.pairs, tensors, tokens or {})


def test_whole_tensors_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    base = small_tensors(BFLOAT16)
    norm, head = random_array((6,), 40), np.array(base["lm_head.weight"])
    adapter = _beside(
        {"model.norm.weight": norm, "lm_head.weight": head}, modules_to_save=("norm", "lm_head")
    )
    with Checkpoint(write_model(tmp_path / "m", [base])) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert merged.merged_names == (*MERGED, "model.norm.weight")
        assert merged.tensor("model.norm.weight").tobytes() == norm.astype(BFLOAT16).tobytes()
        assert merged.tensor("model.norm.weight", np.float32).tobytes() == norm.tobytes()
        assert merged.rows("model.norm.weight", 1, 3, np.float32).tobytes() == norm[1:3].tobytes()
        assert np.shares_memory(merged.tensor("lm_head.weight"), checkpoint.tensor("lm_head.weight"))


def test_a_trained_bias_and_the_bias_of_lora_b_are_added_up(tmp_path: Path) -> None:
    trained = random_array((8,), 41)
    config = LoraConfig(r=2, lora_alpha=3, lora_bias=True, bias="lora_only")
    pair = LoraPair(A6, B8, 1.5, bias=MAGNITUDE)
    adapter = Adapter(config, {"straight": pair}, {"straight.bias": trained})
    with Checkpoint(write_model(tmp_path / "m", [BASE])) as checkpoint:
        ours = MergedWeights(checkpoint, adapter).tensor("straight.bias", np.float32)
    exact = _merge(trained[:, None], np.ones((1, 1)), MAGNITUDE[:, None], np.float32)[:, 0]
    assert ours.tobytes() == exact.tobytes()


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_take_the_place_of_their_rows(tmp_path: Path, tied: bool) -> None:
    tensors = small_tensors(BFLOAT16)
    if tied:
        del tensors["lm_head.weight"]
    rows = random_array((3, 6), 42)
    adapter = _beside({}, {"model.embed_tokens": rows}, trainable_token_indices={"embed_tokens": (7, 0, 3)})
    name = "model.embed_tokens.weight"
    expected = tensors[name].copy()
    expected[[7, 0, 3]] = rows.astype(BFLOAT16)
    with Checkpoint(write_model(tmp_path / "m", [tensors], {"tie_word_embeddings": tied})) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert name in merged.merged_names
        assert merged.tensor(name).tobytes() == expected.tobytes()
        for start, stop in ((0, 2), (2, 8), (8, 10)):
            assert merged.rows(name, start, stop).tobytes() == expected[start:stop].tobytes()
        assert merged.rows(name, 3, 4, np.float32).tobytes() == rows[2:].tobytes()
        assert checkpoint.tensor(name).tobytes() == tensors[name].tobytes()


def test_a_tied_embedding_is_replaced_once_where_the_adapter_keeps_it_tied(tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors["lm_head.weight"]
    name, array = "model.embed_tokens.weight", random_array((10, 6), 43)
    options: dict[str, Any] = {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}
    adapter = _beside({name: array, "lm_head.weight": array}, **options)
    with Checkpoint(write_model(tmp_path / "m", [tensors], {"tie_word_embeddings": True})) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        assert merged.merged_names == (name, *MERGED)
        assert merged.tensor(name).tobytes() == array.tobytes()
        other = _beside({name: array, "lm_head.weight": array + 1}, **options)
        with pytest.raises(TargetError, match=r"^lm_head\.weight: the model has no such tensor"):
            MergedWeights(checkpoint, other)
        loose = _beside({name: array}, modules_to_save=("embed_tokens",))
        with pytest.raises(TargetError, match=r"embed_tokens\.weight: .* train it with ensure_weight_tying"):
            MergedWeights(checkpoint, loose)


def _saved(name: str, array: Array) -> Adapter:
    return _beside({name: array}, modules_to_save=(name.rpartition(".")[0],))


def _tokens(path: str, indices: tuple[int, ...], rows: Array) -> Adapter:
    return _beside({}, {path: rows}, trainable_token_indices={path: indices})


E_A, E_B = random_array((2, 10), 1), random_array((6, 2), 2)
EMBEDDED = _small("model.embed_tokens", E_A, E_B, "embedding")
UNNAMED = _small("experts", STACK_A, STACK_B, "parameter", **STACKED)
TWO_ORDERS = LoraConfig(r=2, lora_alpha=3, fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (_saved("model.gone.weight", MAGNITUDE), TargetError, "gone.weight: the model has no such tensor"),
        (
            _saved("model.norm.weight", MAGNITUDE),
            ShapeError,
            "norm.weight: the model's shape is (6,), the adapter's (8,)",
        ),
        (
            _saved("model.norm.weight", np.ones(6, np.int32)),
            DTypeError,
            "norm.weight: the model's dtype is float32, the adapter's int32",
        ),
        (
            Adapter(
                EMBEDDED.config, EMBEDDED.pairs, {"model.embed_tokens.weight": np.ones((10, 6), np.float32)}
            ),
            TargetError,
            "model.embed_tokens.weight: the adapter was trained on other numbers",
        ),
        (
            _small("model.embed_tokens", E_A, E_B, "embedding", use_dora=True, magnitude=MAGNITUDE[:6]),
            TargetError,
            "embed_tokens.weight: expected rows that each have a magnitude",
        ),
        (
            _small("model.embed_tokens", random_array((2, 6), 1), random_array((10, 2), 2), "embedding"),
            TargetError,
            "the model's shape is (10, 6), the adapter's (6, 10)",
        ),
        (
            _small(Q0, A6, B8, lora_bias=True, bias_of_B=MAGNITUDE),
            TargetError,
            "q_proj.bias: the model has no such tensor, the adapter has a bias of lora_B",
        ),
        (UNNAMED, ConfigError, "experts: expected a stacked parameter's name"),
        (
            _small(
                "experts.square",
                random_array((6, 4), 1),
                random_array((4, 6), 2),
                "parameter",
                target_modules=(),
                target_parameters=("square",),
            ),
            TargetError,
            "experts.square: stored (E, out, in) or (E, in, out)",
        ),
        (
            _small("experts.up", random_array((4, 4), 1), random_array((5, 4), 2), "parameter", **STACKED),
            TargetError,
            "experts.up: the model's shape is (3, 5, 4), the adapter has 2 weights of (5, 4)",
        ),
        (
            _small("experts.up", random_array((6, 7), 1), random_array((5, 6), 2), "parameter", **STACKED),
            TargetError,
            "experts.up: the model's shape is (3, 5, 4), the adapter has 3 weights of (5, 7)",
        ),
        (
            _small("conv", random_array((2, 3, 2), 1), random_array((5, 2, 1), 2), "convolution"),
            TargetError,
            "conv.weight: the model's shape is (5, 3, 2, 2), the adapter's (5, 3, 2)",
        ),
        (
            _small("turned", A6, B8),
            TargetError,
            "turned.weight: the model's shape is (6, 8), the adapter's (8, 6)",
        ),
        (
            _tokens("model.embed_tokens", (10,), random_array((1, 6), 1)),
            TargetError,
            "the model's shape is (10, 6), the adapter has rows of 6 for tokens up to 10",
        ),
        (
            _tokens("model.embed_tokens", (1,), random_array((1, 5), 1)),
            TargetError,
            "has rows of 5 for tokens up to 1",
        ),
        (
            _tokens("model.gone", (1,), random_array((1, 5), 1)),
            TargetError,
            "model.gone.weight: the model has no such tensor",
        ),
        (
            Adapter(TWO_ORDERS, {"straight": LoraPair(A6, B8, 1.5), "square": LoraPair(A6, B8[:6], 1.5)}),
            TargetError,
            "square.weight: stored (out, in) or (in, out), which its shape (6, 6) does not tell",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, adapter: Adapter, error: type[LoracleError], message: str
) -> None:
    with (
        Checkpoint(write_model(tmp_path / "m", [{**small_tensors(), **BASE}])) as checkpoint,
        pytest.raises(error, match=re.escape(message)) as caught,
    ):
        MergedWeights(checkpoint, adapter)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_tokens_of_a_tied_embedding_that_is_stored_twice_are_refused(tmp_path: Path) -> None:
    adapter = _tokens("model.embed_tokens", (1,), random_array((1, 6), 1))
    with (
        Checkpoint(write_model(tmp_path / "m", None, {"tie_word_embeddings": True})) as checkpoint,
        pytest.raises(TargetError, match=r"embed_tokens\.weight: .* holds it twice"),
    ):
        MergedWeights(checkpoint, adapter)
