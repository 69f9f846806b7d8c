"""LitGPT's state dicts become adapters of Hugging Face's layers with LitGPT's own update of every weight."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from files_fixtures import Array
from hypothesis import given
from hypothesis import strategies as st

from loracle.files import adapter_from_litgpt
from loracle.reference import ConfigError, FileError, LoracleError, ShapeError, TargetError

EMBD, HEAD_SIZE = 6, 4


def _integers(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def _sizes(heads: int, groups: int) -> tuple[int, int, int]:
    return HEAD_SIZE * heads, HEAD_SIZE * groups, HEAD_SIZE * groups


def litgpt_update(
    A: Array, B: Array, scaling: float, heads: int, groups: int, enabled: tuple[bool, ...]
) -> Array:
    """LitGPT's ``LoRAQKVLinear.get_lora_AB``, in its own steps: chunks, a product each, cat and zero_pad."""
    shapes = [size for size, on in zip(_sizes(heads, groups), enabled, strict=True) if on]
    inputs = np.array_split(A, sum(enabled), axis=0)  # chunk
    weights = np.split(B, np.cumsum(shapes)[:-1])  # split
    lora = np.concatenate([b @ a for a, b in zip(inputs, weights, strict=True)])
    queries, keys, _ = _sizes(heads, groups)
    index: list[int] = []
    if enabled[0]:
        index.extend(range(queries))
    if enabled[1]:
        index.extend(range(queries, queries + keys))
    if enabled[2]:
        index.extend(range(queries + keys, queries + 2 * keys))
    result = np.zeros((EMBD, queries + 2 * keys), np.float32)  # zero_pad pads the last dimension of lora.T
    result[:, index] = lora.T * scaling
    return result.T


def _state(r: int, heads: int, groups: int, enabled: tuple[bool, ...], layers: int = 2) -> dict[str, Array]:
    state = {}
    rows = sum(size for size, on in zip(_sizes(heads, groups), enabled, strict=True) if on)
    for layer in range(layers):
        module = f"transformer.h.{layer}.attn.qkv"
        state[f"{module}.lora_A"] = _integers((r * sum(enabled), EMBD), layer)
        state[f"{module}.lora_B"] = _integers((rows, r), 10 + layer)
    return state


def _read(state: dict[str, Any], **options: Any) -> Any:
    sizes = {"n_head": 4, "n_query_groups": 2, "head_size": HEAD_SIZE}
    return adapter_from_litgpt(state, **{"lora_r": 2, "lora_alpha": 8, **sizes, **options})


@pytest.mark.parametrize("enabled", [flags for flags in product((True, False), repeat=3) if any(flags)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_query_key_and_value_get_their_rows_of_litgpt_s_update(
    enabled: tuple[bool, ...], heads: int, groups: int, wrapped: bool
) -> None:
    state = _state(2, heads, groups, enabled)
    adapter = _read(
        {"model": state} if wrapped else state,
        n_head=heads,
        n_query_groups=groups,
        **dict(zip(("lora_query", "lora_key", "lora_value"), enabled, strict=True)),
    )
    names = [name for name, on in zip(("q_proj", "k_proj", "v_proj"), enabled, strict=True) if on]
    assert len(adapter.pairs) == 2 * len(names)
    assert adapter.config.target_modules == tuple(sorted(names))
    for layer in range(2):
        module = f"transformer.h.{layer}.attn.qkv"
        A, B = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
        whole = litgpt_update(A, B, 4.0, heads, groups, enabled)
        parts = np.split(whole, np.cumsum(_sizes(heads, groups))[:-1])  # copy_weights_llama
        for name, part, on in zip(("q_proj", "k_proj", "v_proj"), parts, enabled, strict=True):
            pair = adapter.pairs.get(f"model.layers.{layer}.self_attn.{name}")
            assert (pair is not None) == on
            if pair is not None:
                np.testing.assert_array_equal(pair.scaling * pair.B @ pair.A, part)
            else:
                assert not part.any()


@given(r=st.integers(1, 4), groups=st.integers(1, 3), times=st.integers(1, 3))
def test_any_rank_and_number_of_heads(r: int, groups: int, times: int) -> None:
    heads, enabled = groups * times, (True, True, False)
    state = _state(r, heads, groups, enabled, layers=1)
    options = {"lora_r": r, "n_head": heads, "n_query_groups": groups, "lora_key": True, "lora_value": False}
    adapter = _read(state, **options)
    A, B = state.values()
    whole = litgpt_update(A, B, 8 / r, heads, groups, enabled)
    (q, k) = (adapter.pairs[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    joined = np.concatenate([(q.B @ q.A) * np.float32(q.scaling), (k.B @ k.A) * np.float32(k.scaling)])
    np.testing.assert_allclose(joined, whole[: len(joined)], rtol=1e-6)


def test_the_other_layers_keep_their_tensors_under_the_names_of_llama() -> None:
    names = {
        "transformer.h.1.attn.proj": "model.layers.1.self_attn.o_proj",
        "transformer.h.0.mlp.fc_1": "model.layers.0.mlp.gate_proj",
        "transformer.h.0.mlp.fc_2": "model.layers.0.mlp.up_proj",
        "transformer.h.12.mlp.proj": "model.layers.12.mlp.down_proj",
        "lm_head": "lm_head",
    }
    state = {}
    for number, name in enumerate(names):
        state |= {
            f"{name}.lora_A": _integers((2, 6), number),
            f"{name}.lora_B": _integers((5, 2), 9 + number),
        }
    adapter = _read(state, lora_dropout=0.25)
    assert adapter.pairs.keys() == set(names.values())
    for theirs, ours in names.items():
        assert adapter.pairs[ours].A is state[f"{theirs}.lora_A"]
        assert adapter.pairs[ours].B is state[f"{theirs}.lora_B"]
        assert adapter.pairs[ours].scaling == 4.0
    assert adapter.config.lora_dropout == 0.25


A, B = _integers((4, 6), 0), _integers((24, 2), 1)
PAIR = {"A": A, "B": B}


def _named(module: str) -> dict[str, Array]:
    return {f"{module}.lora_{part}": array for part, array in PAIR.items()}


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        ({}, {}, TargetError, "the state dict has no lora_A"),
        (
            {"lm_head.weight": A},
            {},
            FileError,
            r"tensor lm_head\.weight is not understood.*lit_model\.pth\.lora",
        ),
        ({"lm_head.lora_A": A}, {}, FileError, r"^lm_head\.lora_B is missing"),
        (
            _named("transformer.h.0.attn.attn"),
            {},
            FileError,
            r"tensor transformer\.h\.0\.attn\.attn\.lora_A is",
        ),
        (_named("transformer.h.0.mlp.fc"), {}, FileError, "only Llama-like models"),
        (_named("transformer.h.0.mlp.experts.0.fc_1"), {}, FileError, "only Llama-like models"),
        (_named("transformer.h.0.mlp.gate"), {}, FileError, "only Llama-like models"),
        (_named("transformer.wte"), {}, FileError, "only Llama-like models"),
        (
            _named("transformer.h.0.attn.qkv"),
            {"lora_key": True},
            ShapeError,
            r"^transformer\.h\.0\.attn\.qkv: B",
        ),
        (
            _named("transformer.h.0.attn.qkv"),
            {"head_size": 8},
            ShapeError,
            r"attn\.qkv: B: expected \(48, r\)",
        ),
        (
            _named("transformer.h.0.attn.qkv"),
            {"lora_r": 4},
            ShapeError,
            r"q_proj\.lora_A\.weight: .* \(4, in\)",
        ),
        (
            _named("transformer.h.0.attn.qkv"),
            {"n_query_groups": 3},
            ConfigError,
            "divisor of n_head 4, got 3",
        ),
        (_named("transformer.h.0.attn.qkv"), {"n_head": 0}, ConfigError, "n_head: expected an integer"),
        (_named("lm_head"), {}, ShapeError, r"lm_head\.lora_A\.weight: expected shape \(2, in\)"),
    ],
)
def test_what_is_not_llama_s_is_refused_by_name(
    state: dict[str, Array], options: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        _read(state, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
