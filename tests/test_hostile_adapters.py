"""Adapter folders that are made to deceive: configurations, tensors and heads of them."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import Q0, V0, Array, random_array, small_adapter, write_model
from limited import run_limited

from loracle.files import Checkpoint, LoraConfig, MergedWeights, read_adapter, write_adapter
from loracle.files.matching import layer_selected
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import ConfigError, FileError, LoracleError

KEY = f"base_model.model.{Q0}.lora_A.weight"
ENDLESS = "(a+)+$"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "a"
    write_adapter(folder, small_adapter())
    return folder


def changed(
    whole: Path, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array] | None = None
) -> Path:
    """A copy of the adapter with some keys and tensors in place of its own."""
    shutil.copytree(whole, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors is not None:
        (folder / "adapter_model.safetensors").unlink()
        own = small_adapter()
        arrays = {
            f"base_model.model.{name}.lora_{part}.weight": getattr(pair, part)
            for name, pair in own.pairs.items()
            for part in ("A", "B")
        }
        write_safetensors(folder / "adapter_model.safetensors", {**arrays, **tensors})
    return folder


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_whose_file_is_cut_anywhere_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path / "a")
    content = (whole / name).read_bytes()
    for end in range(0, len(content.rstrip()), 1 if name.endswith("json") else 7):
        (tmp_path / "a" / name).write_bytes(content[:end])
        with pytest.raises(LoracleError):
            read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 10**400},
        {"r": 2**31},
        {"r": True},
        {"r": 2.0},
        {"r": -2},
        {"lora_alpha": 10**400},
        {"lora_alpha": [1]},
        {"lora_dropout": 10**400},
        {"rank_pattern": {"q_proj": 10**400}},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": [["q_proj", 2]]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"target_modules": "("},
        {"target_modules": "(" * 5000},
        {"target_modules": "a{99999999999}"},
        {"target_modules": [["q_proj"]]},
        {"target_modules": {"q_proj": 1}},
        {"layers_to_transform": [10**400], "layers_pattern": "("},
        {"layers_to_transform": [1.5]},
        {"modules_to_save": ["("]},
        {"modules_to_save": "lm_head"},
        {"trainable_token_indices": [2**31]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"": [1]}},
        {"init_lora_weights": {"a": 1}},
        {"bias": ["none"]},
        {"task_type": 3},
        {"peft_type": ["LORA"]},
        {"x" * 5000: {"a": [[[1]]]}},
    ],
)
def test_a_value_that_no_adapter_has_is_refused(whole: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = changed(whole, tmp_path / "a", config)
    with pytest.raises(ConfigError, match=r"adapter_config\.json") as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {ENDLESS: 2}},
        {"modules_to_save": [ENDLESS]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
        {"target_modules": ".*" * 12 + "!"},
    ],
)
def test_an_expression_that_takes_for_ever_is_not_followed(
    whole: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """The path of a module is the file's as well: forty times "a" would take years."""
    name = f"base_model.model.{'a' * 40}!.q_proj"
    tensors = {
        f"{name}.lora_A.weight": random_array((2, 6), 0),
        f"{name}.lora_B.weight": random_array((8, 2), 0),
    }
    folder = changed(whole, tmp_path / "a", config, tensors)
    started = time.process_time()
    with pytest.raises(ConfigError, match="may take for ever"):
        read_adapter(folder)
    assert time.process_time() - started < 5


def test_many_tokens_with_a_duplicate_at_the_end_take_no_longer_than_many_tokens() -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match="each token once, got 49999"):
        LoraConfig(trainable_token_indices=(*range(50_000), 49_999))
    assert time.process_time() - started < 5


def test_a_layer_with_a_number_of_thousands_of_digits_is_no_layer() -> None:
    path = f"model.layers.{'1' * 5000}.q_proj"
    assert not layer_selected(path, [1])
    assert not layer_selected(path, 1, "layers")
    assert layer_selected(f"model.layers.{'0' * 17}1.q_proj", 1)


@pytest.mark.parametrize(
    "tensor",
    [
        np.full((2, 6), np.nan, np.float32),
        np.full((2, 6), np.inf, np.float16),
        np.zeros((0, 6), np.float32),
        np.zeros((2, 0), np.float32),
        np.zeros((), np.float32),
        np.zeros((12,), np.float32),
        np.zeros((2, 6, 1, 1, 1, 1), np.float32),
        np.zeros((2, 6), np.int64),
        np.zeros((2, 6), bool),
        np.zeros((2, 7), np.float32),
        np.zeros((3, 6), np.float32),
    ],
)
def test_a_tensor_that_is_no_part_of_a_pair_is_refused(whole: Path, tmp_path: Path, tensor: Array) -> None:
    folder = changed(whole, tmp_path / "a", {}, {KEY: tensor})
    base = write_model(tmp_path / "m")
    with pytest.raises(LoracleError) as caught, Checkpoint(base) as checkpoint:
        MergedWeights(checkpoint, read_adapter(folder))
    assert f"{Q0}" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../../x", "/etc/passwd", "..", "a/b", "model.layers.0.self_attn.q_proj\0", "q_proj" * 2000]
)
def test_a_path_of_no_module_is_refused(whole: Path, tmp_path: Path, path: str) -> None:
    tensors = {
        f"base_model.model.{path}.lora_A.weight": random_array((2, 6), 0),
        f"base_model.model.{path}.lora_B.weight": random_array((8, 2), 0),
    }
    folder = changed(whole, tmp_path / "a", {"target_modules": [path, "q_proj", "v_proj"]}, tensors)
    base = write_model(tmp_path / "m")
    with pytest.raises(LoracleError), Checkpoint(base) as checkpoint:
        MergedWeights(checkpoint, read_adapter(folder))


def test_an_update_that_leaves_the_range_of_its_dtype_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = changed(whole, tmp_path / "a", {"lora_alpha": 1e308}, {})
    base = write_model(tmp_path / "m")
    with Checkpoint(base) as checkpoint:
        weights = MergedWeights(checkpoint, read_adapter(folder))
        with pytest.raises(LoracleError, match=Q0):
            weights.tensor(f"{Q0}.weight", None)
    assert math.isfinite(LoraConfig(lora_alpha=1e308, r=1).scaling_of(V0))


@pytest.mark.parametrize(
    "head",
    [
        {"id2label": {"0": "a", "1": "a"}, "label2id": {"a": 1, "b": 0}},
        {"id2label": {"0": "a", "00": "b"}, "label2id": {"a": 0, "b": 1}},
        {"id2label": {"0": ["a"]}, "label2id": {}},
        {"id2label": {str(10**300): "a"}, "label2id": {"a": 10**300}},
        {"architectures": ["a", "b"]},
        {"architectures": {"a": "b"}},
        {"pad_token_id": True},
        {"problem_type": 1},
        {"torch_dtype": "float16"},
    ],
)
def test_a_head_that_is_none_is_refused(whole: Path, tmp_path: Path, head: dict[str, Any]) -> None:
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a" / "head.json").write_text(json.dumps(head))
    with pytest.raises(FileError, match=r"head\.json"):
        read_adapter(tmp_path / "a")


def test_an_adapter_that_only_claims_its_numbers_is_refused_where_memory_ends(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(whole, folder)
    path = folder / "adapter_model.safetensors"
    rows = 2**31
    header = {
        KEY: {"dtype": "F32", "shape": [2, rows], "data_offsets": [0, 8 * rows]},
        KEY.replace("lora_A", "lora_B"): {
            "dtype": "F32",
            "shape": [1, 2],
            "data_offsets": [8 * rows, 8 * rows + 8],
        },
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 8 * rows + 8)
    code = """
import sys
from loracle.files import read_adapter
from loracle.reference import FileError
limit(memory=2**34 + 2**30)
try:
    read_adapter(sys.argv[1])
except FileError as error:
    print(error)
"""
    assert "expected an adapter that fits into memory" in run_limited(code, folder)
