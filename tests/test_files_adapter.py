"""Adapters are read as PEFT means them, written as PEFT reads them, and refused when they do not add up."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Q0, V0, Array, peft_adapter, random_array, small_adapter, tiny_llama

from loracle.files import Adapter, LoraConfig, LoraPair, read_adapter, write_adapter
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import (
    ConfigError,
    DTypeError,
    FileError,
    LoracleError,
    NonFiniteError,
    ShapeError,
    TargetError,
)

WEIGHTS = "adapter_model.safetensors"


def _folder(
    tmp_path: Path, tensors: dict[str, Array] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A folder with a valid adapter, or with the given tensors or config keys in place of its own."""
    folder = tmp_path / "adapter"
    write_adapter(folder, small_adapter())
    if tensors is not None:
        (folder / WEIGHTS).unlink()
        write_safetensors(folder / WEIGHTS, tensors)
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def _tensors(**changed: Array | None) -> dict[str, Array]:
    adapter = small_adapter()
    tensors = {}
    for path, letter in ((Q0, "q"), (V0, "v")):
        for part in ("A", "B"):
            array = changed.get(f"{letter}{part}", getattr(adapter.pairs[path], part))
            if array is not None:
                tensors[f"base_model.model.{path}.lora_{part}.weight"] = array
    return tensors


@pytest.mark.parametrize(
    "options",
    [
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": r".*\.1\..*(q|down)_proj"},
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {r"layers\.0.*q_proj": 2, "up_proj": 1},
            "alpha_pattern": {"layers.1.self_attn.o_proj": 32, "up_proj": 3},
            "exclude_modules": r".*layers\.1\.mlp.*",
        },
        {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_what_peft_trained_is_read_with_its_tensors_and_scalings(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tuned = peft_adapter(tiny_llama(), tmp_path / "adapter", **options)
    adapter = read_adapter(tmp_path / "adapter")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }
    assert sorted(adapter.pairs) == sorted(layers)
    for path, module in layers.items():
        pair = adapter.pairs[path]
        np.testing.assert_array_equal(pair.A, module.lora_A["default"].weight.detach().numpy())
        np.testing.assert_array_equal(pair.B, module.lora_B["default"].weight.detach().numpy())
        assert pair.scaling == module.scaling["default"]
        assert pair.shape == tuple(module.base_layer.weight.shape)
        assert pair.r == module.r["default"]


def test_what_we_write_peft_loads_with_the_same_tensors_and_scalings(tmp_path: Path) -> None:
    from peft import PeftModel

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=("q_proj", "v_proj"),
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 3.0},
        layers_to_transform=(0, 1),
    )
    arrays = {}
    for layer in (0, 1):
        for name, out in (("q_proj", 16), ("v_proj", 8)):
            path = f"model.layers.{layer}.self_attn.{name}"
            r = config.rank_of(path)
            arrays[path] = (random_array((r, 16), layer), random_array((out, r), layer + 2))
    write_adapter(tmp_path / "adapter", Adapter.from_arrays(config, arrays))
    tuned = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    for path, (A, B) in arrays.items():
        module = tuned.get_submodule(f"base_model.model.{path}")
        np.testing.assert_array_equal(module.lora_A["default"].weight.detach().numpy(), A)
        np.testing.assert_array_equal(module.lora_B["default"].weight.detach().numpy(), B)
        assert module.scaling["default"] == config.scaling_of(path)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_writing_and_reading_keeps_every_bit_and_dtype(tmp_path: Path, dtype: Any) -> None:
    adapter = small_adapter(dtype)
    write_adapter(tmp_path / "a", adapter)
    again = read_adapter(tmp_path / "a")
    assert again.config == adapter.config
    for path, pair in adapter.pairs.items():
        for part in ("A", "B"):
            ours, theirs = getattr(pair, part), getattr(again.pairs[path], part)
            assert theirs.dtype == dtype
            assert theirs.tobytes() == ours.tobytes()
    assert again.parameters == 2 * (6 + 8) + 2 * (6 + 4)


def test_equal_adapters_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    adapter = small_adapter()
    turned = Adapter(adapter.config, dict(reversed(adapter.pairs.items())))
    write_adapter(tmp_path / "a", adapter)
    write_adapter(tmp_path / "b", turned)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_adapter_is_independent_of_its_file(tmp_path: Path) -> None:
    adapter = read_adapter(_folder(tmp_path))
    before = adapter.pairs[Q0].A.copy()
    path = tmp_path / "adapter" / WEIGHTS
    path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(adapter.pairs[Q0].A, before)


NAN = np.full((2, 6), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"qA": random_array((3, 6), 0)}, ShapeError, r"q_proj\.lora_A.*\(2, in\).*\(3, 6\)"),
        ({"vB": random_array((4, 3), 0)}, ShapeError, r"v_proj\.lora_B.*\(out, 2\).*\(4, 3\)"),
        ({"vA": random_array((12,), 0)}, ShapeError, r"v_proj\.lora_A"),
        ({"vA": random_array((2, 0), 0)}, ShapeError, r"v_proj\.lora_A"),
        ({"qB": None}, FileError, r"q_proj\.lora_B\.weight is missing"),
        ({"qA": None}, FileError, r"q_proj\.lora_A\.weight is missing"),
        ({"qA": NAN}, NonFiniteError, r"q_proj\.lora_A"),
        ({"vB": np.full((4, 2), np.inf, BFLOAT16)}, NonFiniteError, r"v_proj\.lora_B"),
        ({"qA": np.ones((2, 6), np.int32)}, DTypeError, r"q_proj\.lora_A.*int32"),
        ({"qA": None, "qB": None, "vA": None, "vB": None}, TargetError, "no lora_A"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_one_line_that_names_file_and_tensor(
    tmp_path: Path, changed: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    folder = _folder(tmp_path, _tensors(**changed))
    with pytest.raises(error, match=message) as caught:
        read_adapter(folder)
    assert str(caught.value).startswith(str(folder / WEIGHTS))
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q0}.lora_A.default.weight",
        f"base_model.model.{Q0}.lora_diag",
        f"base_model.model.{Q0}.lora_A",
        f"{Q0}.lora_A.weight",
        f"{Q0}.weight",
        "lora_A.weight",
        "base_model.model..lora_A.weight",
        "base_model.model.lora_A.weight",
        "base_model.model..weight",
        "base_model.model.",
        "",
    ],
)
def test_a_tensor_that_is_not_understood_is_named(tmp_path: Path, key: str) -> None:
    folder = _folder(tmp_path, {**_tensors(), key: random_array((2, 6), 0)})
    with pytest.raises(FileError, match=f"tensor {re.escape(key)} is not understood"):
        read_adapter(folder)


X0 = "model.layers.0.x"


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (f"{Q0}.weight", TargetError, f"{Q0}.base_layer.weight: lies in no module of modules_to_save None"),
        (f"{Q0}.base_layer.weight", TargetError, "bias 'none' trains, and no embedding's weight"),
        ("model.norm.weight", TargetError, "model.norm.weight: lies in no module"),
        ("lm_head.in_proj_bias", TargetError, "lm_head.in_proj_bias: lies in no module"),
        ("bias", TargetError, "base_model.model.bias: lies in no module"),
        (f"{Q0}.lora_magnitude_vector", TargetError, "expected none by the adapter's config (use_dora"),
        (f"{Q0}.lora_B.bias", TargetError, "expected none by the adapter's config (lora_bias False)"),
        (f"{X0}.lora_B.bias", FileError, f"{X0}.lora_A.weight is missing"),
        (f"{X0}.lora_magnitude_vector", FileError, f"{X0}.lora_A.weight is missing"),
        (f"{X0}.lora_embedding_A", FileError, f"{X0}.lora_embedding_B is missing"),
        (f"{X0}.lora_embedding_B", FileError, f"{X0}.lora_embedding_A is missing"),
        (f"{Q0}.lora_embedding_A", FileError, f"{Q0}.lora_embedding_B is missing"),
        (f"{Q0}.base_layer.lora_A.weight", FileError, f"{Q0}.lora_A.weight is of a parameter of"),
        ("e.token_adapter.trainable_tokens_delta", TargetError, "e is not among trainable_token_indices"),
        ("lm_head.weight.absmax", TargetError, "lm_head.weight.absmax: lies in no module"),
    ],
)  # fmt: skip
def test_a_tensor_that_has_no_place_is_named(
    tmp_path: Path, key: str, error: type[LoracleError], message: str
) -> None:
    folder = _folder(tmp_path, {**_tensors(), f"base_model.model.{key}": random_array((2, 6), 0)})
    with pytest.raises(error, match=re.escape(message)) as caught:
        read_adapter(folder)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(folder / WEIGHTS))
    assert "\n" not in str(caught.value)


def test_a_module_named_base_layer_is_not_taken_for_a_wrapper(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=("base_layer",), bias="all")
    path = "model.base_layer.0.base_layer"
    pair = LoraPair(random_array((2, 6), 0), random_array((4, 2), 1), config.scaling_of(path))
    adapter = Adapter(config, {path: pair}, {f"{path}.bias": np.ones(4, np.float32)})
    write_adapter(tmp_path / "a", adapter)
    again = read_adapter(tmp_path / "a")
    assert list(again.pairs) == [path]
    assert list(again.tensors) == [f"{path}.bias"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"target_modules": ["q_proj"]}, TargetError, f"{V0} is not targeted"),
        ({"exclude_modules": ["v_proj"]}, TargetError, f"{V0} is not targeted"),
        ({"r": 4}, ShapeError, r"\(4, in\)"),
        ({"rank_pattern": {"v_proj": 1}}, ShapeError, "v_proj"),
        ({"use_dora": True}, TargetError, "q_proj.lora_magnitude_vector: expected one"),
        ({"use_qalora": True}, ConfigError, "adapter_config.json: use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, ConfigError, "adapter_config.json: init_lora_weights"),
        ({"magic": 1}, ConfigError, "magic: unknown key"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, config: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_adapter(_folder(tmp_path, config=config))


def test_missing_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such adapter folder"):
        read_adapter(tmp_path / "absent")
    folder = _folder(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileError, match="complete"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileError, match="save the adapter again with PEFT"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileError, match=r"has no adapter_config\.json"):
        read_adapter(folder)


def test_a_pair_must_carry_the_scaling_of_the_config() -> None:
    adapter = small_adapter()
    pair = adapter.pairs[Q0]
    with pytest.raises(TargetError, match="scaling"):
        Adapter(adapter.config, {**adapter.pairs, Q0: LoraPair(pair.A, pair.B, pair.scaling * 2)})


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileError, match="exists and is not empty"):
        write_adapter(folder, small_adapter(r=2, lora_alpha=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _pair(config: LoraConfig, path: str = Q0, **changed: Any) -> LoraPair:
    given = {"A": random_array((2, 6), 0), "B": random_array((8, 2), 1), "scaling": config.scaling_of(path)}
    return LoraPair(**{**given, **changed})


DORA = LoraConfig(r=2, use_dora=True, target_modules=("q_proj", "embed", "conv"))
BIAS = LoraConfig(r=2, lora_bias=True, target_modules=("q_proj", "embed", "conv"))
PLAIN = LoraConfig(r=2, target_modules=("q_proj", "embed", "conv"))
CONV = {"A": random_array((2, 6, 3, 3), 0), "B": random_array((8, 2, 1, 1), 1), "kind": "convolution"}
ONES = np.ones(8, np.float32)
KEY = f"base_model.model.{Q0}"


@pytest.mark.parametrize(
    ("config", "changed", "error", "message"),
    [
        (DORA, {"magnitude": np.ones(6, np.float32)}, ShapeError, r"vector: expected shape \(8,\) .* \(6,\)"),
        (DORA, {"magnitude": np.ones((1, 8), np.float32)}, ShapeError, r"vector: expected shape \(8,\)"),
        (DORA, {"magnitude": np.full(8, np.inf)}, NonFiniteError, "lora_magnitude_vector: holds NaN"),
        (DORA, {"magnitude": np.ones(8, np.int8)}, DTypeError, "lora_magnitude_vector: .* int8"),
        (DORA, {**CONV, "magnitude": ONES}, ShapeError, r"vector: expected shape \(1, 8, 1, 1\)"),
        (BIAS, {"bias": np.ones(6, np.float32)}, ShapeError, r"lora_B\.bias: expected shape \(8,\)"),
        (BIAS, {"bias": np.full(8, np.nan)}, NonFiniteError, r"lora_B\.bias: holds NaN"),
        (BIAS, {"bias": np.ones(8, np.int64)}, DTypeError, r"lora_B\.bias: .* int64"),
        (PLAIN, {**CONV, "A": random_array((2, 6), 0)}, ShapeError, r"expected shape \(2, in, \*kernel\)"),
        (PLAIN, {**CONV, "kind": "linear"}, ShapeError, r"lora_A\.weight: expected shape \(2, in\)"),
        (PLAIN, {**CONV, "A": random_array((2, 6, 3, 3, 3, 3), 0)}, ShapeError, r"lora_A\.weight"),
        (PLAIN, {**CONV, "B": random_array((8, 2), 0)}, ShapeError, r"lora_B\.weight: .* \(out, 2, 1, 1\)"),
        (PLAIN, {**CONV, "B": random_array((8, 2, 3, 3), 0)}, ShapeError, r"lora_B\.weight: .*\(8, 2, 3"),
        (PLAIN, {"kind": "embedding", "B": ONES}, ShapeError, r"embedding_B: expected shape \(d, 2\)"),
        (PLAIN, {"kind": "magic"}, TargetError, "expected a kind among linear, embedding"),
        (PLAIN, {"A": np.float32(1.0) * np.ones(())}, ShapeError, r"lora_A\.weight: .* got \(\)"),
        (PLAIN, {"kind": "parameter"}, TargetError, "parameter .* is not targeted"),
    ],
)  # fmt: skip
def test_every_array_of_a_pair_is_checked_by_name(
    config: LoraConfig, changed: dict[str, Any], error: type[LoracleError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Adapter(config, {Q0: _pair(config, **changed)})
    assert type(caught.value) is error
    assert Q0 in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_of_every_kind_tell_their_weight_s_shape() -> None:
    assert _pair(PLAIN).shape == (8, 6)
    assert _pair(PLAIN, kind="embedding").shape == (6, 8)
    assert _pair(PLAIN, **CONV).shape == (8, 6, 3, 3)
    stacked = _pair(PLAIN, A=random_array((6, 5), 0), B=random_array((7, 6), 1), kind="parameter")
    assert (stacked.shape, stacked.r) == ((7, 5), 6)
    dora = Adapter(DORA, {Q0: _pair(DORA, magnitude=ONES)})
    assert dora.parameters == 2 * 6 + 8 * 2 + 8


@pytest.mark.parametrize(
    ("options", "tensors", "tokens", "error", "message"),
    [
        ({"bias": "all"}, {"x.bias": np.array([np.nan])}, {}, NonFiniteError, r"x\.bias: holds NaN"),
        ({"bias": "all"}, {"x.bias": np.ones(2, complex)}, {}, DTypeError, r"x\.bias: .* complex128"),
        ({"bias": "all"}, {"x.weight": ONES}, {}, TargetError, r"x\.weight: lies in no module"),
        ({"bias": "lora_only"}, {"x.bias": ONES}, {}, TargetError, r"x\.bias: lies in no module"),
        ({"trainable_token_indices": (3,)}, {}, {"e": np.ones((2, 4))}, ShapeError, r"\(1, d\).*\(2, 4\)"),
        ({"trainable_token_indices": (3,)}, {}, {"e": np.ones(1)}, ShapeError, r"e\.token_adapter\."),
        ({"trainable_token_indices": (3,)}, {}, {"e": np.full((1, 4), np.inf)}, NonFiniteError, "holds NaN"),
        ({"trainable_token_indices": (3,)}, {}, {"e": np.ones((1, 4), int)}, DTypeError, "int64"),
        ({"trainable_token_indices": (3,)}, {}, {Q0: np.ones((1, 6))}, TargetError, "lora_A and lora_B too"),
        ({"trainable_token_indices": {"e": (3,), "f": (4,)}}, {}, {"e": np.ones((1, 4))}, TargetError,
         r"base_model\.model\.f\.token_adapter\.trainable_tokens_delta: expected a row"),
    ],
)  # fmt: skip
def test_tensors_beside_the_pairs_are_checked_by_name(
    options: dict[str, Any], tensors: Any, tokens: Any, error: type[LoracleError], message: str
) -> None:
    config = LoraConfig(r=2, target_modules=("q_proj",), **options)
    with pytest.raises(error, match=message) as caught:
        Adapter(config, {Q0: _pair(config)}, tensors, tokens)
    assert type(caught.value) is error


def test_an_embedding_tied_to_one_with_the_same_tokens_needs_no_rows_of_its_own() -> None:
    config = LoraConfig(r=2, target_modules=("q_proj",), trainable_token_indices={"e": (3,), "f": (3,)})
    assert Adapter(config, {Q0: _pair(config)}, {}, {"e": np.ones((1, 4))}).tokens.keys() == {"e"}


def test_an_output_layer_that_differs_from_the_embedding_is_not_tied_to_it() -> None:
    config = LoraConfig(r=2, target_modules=("embed",), ensure_weight_tying=True)
    embedding = _pair(config, "embed", kind="embedding")
    head = _pair(config, "head", A=embedding.B.T, B=embedding.A.T)
    assert len(Adapter(config, {"embed": embedding, "head": head}).pairs) == 2
    other = _pair(config, "head", A=embedding.B.T, B=embedding.A.T + 1)
    with pytest.raises(TargetError, match="head is not targeted"):
        Adapter(config, {"embed": embedding, "head": other})
