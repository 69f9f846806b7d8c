"""Checkpoints are read as transformers writes them, without copies; others are refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Array, random_array, small_tensors, tiny_llama, write_model

from loracle.files import Checkpoint
from loracle.reference import FileError

INDEX = "model.safetensors.index.json"


def _halves() -> list[dict[str, Array]]:
    items = list(small_tensors().items())
    return [dict(items[:2]), dict(items[2:])]


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shard_size", ["1GB", "3KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_transformers_saves_is_read_bit_for_bit(tmp_path: Path, shard_size: str, dtype: str) -> None:
    import torch

    model = tiny_llama().to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    with Checkpoint(tmp_path) as checkpoint:
        state = model.state_dict()
        assert set(checkpoint.names) == set(state)
        assert (checkpoint.index is not None) == (shard_size == "3KB") == (len(checkpoint.shards) > 1)
        for name, tensor in state.items():
            assert str(checkpoint.dtype(name)) == dtype
            assert checkpoint.shape(name) == tuple(tensor.shape)
            ours = checkpoint.tensor(name)
            assert ours.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert checkpoint.total_parameters == sum(tensor.numel() for tensor in state.values())
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in state.values())
        assert checkpoint.config["model_type"] == "llama"
        assert not checkpoint.tied


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_are_seen(tmp_path: Path, tie: bool) -> None:
    tiny_llama(tie_word_embeddings=tie).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tied is tie
        assert ("lm_head.weight" in checkpoint) is not tie
    config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tied is tie, "as the tensors show where the configuration is silent"


def test_the_configuration_decides_on_tying_where_both_tensors_are_there(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "m", config={"tie_word_embeddings": True})) as checkpoint:
        assert checkpoint.tied


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with Checkpoint(folder) as checkpoint:
        array = checkpoint.tensor("lm_head.weight")
        assert not array.flags.writeable
        assert not array.flags.owndata
        with open(folder / "model.safetensors", "r+b") as file:  # a change of the file shows through: no copy
            content = file.read()
            file.seek(content.index(array.tobytes()))
            file.write(np.float32(42).tobytes())
        assert array[0, 0] == 42
        checkpoint.release("lm_head.weight")
        assert array[0, 0] == 42
    assert array[0, 0] == 42, "views outlive the checkpoint"
    with pytest.raises(FileError, match="closed"):
        checkpoint.tensor("lm_head.weight")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with (
        Checkpoint(write_model(tmp_path / "m")) as checkpoint,
        pytest.raises(FileError, match="no tensor nope"),
    ):
        checkpoint.shape("nope")


def test_a_cached_snapshot_of_links_is_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    with Checkpoint(snapshot) as checkpoint:
        assert set(checkpoint.names) == set(small_tensors())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model folder"),
        ({}, "is empty"),
        ({"model.safetensors": "x"}, r"has no config\.json"),
        ({"config.json": "{}"}, r"has no model\.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "convert it with transformers"),
        ({"config.json": "{}", "model.gguf": ""}, "convert it with transformers"),
        ({"config.json": "{}", "model-00001-of-00002.safetensors": ""}, "neither model.safetensors nor"),
        ({"config.json": "{", "model.safetensors": ""}, r"config\.json: not valid JSON"),
        ({"config.json": "[]", "model.safetensors": ""}, "expected a JSON object, got list"),
        ({"config.json": '{"a": NaN}', "model.safetensors": ""}, "NaN is not a JSON number"),
        ({"config.json": '{"a": 1, "a": 2}', "model.safetensors": ""}, "duplicate key 'a'"),
        ({"config.json": "[" * 100_000, "model.safetensors": ""}, "not valid JSON"),
        ({"config.json": "{}", "model.safetensors": ""}, "not a safetensors file"),
        ({"config.json": "{}", "model.safetensors": "x" * 100}, "not a safetensors file"),
        ({"config.json": "{}", INDEX: "{}"}, "expected a weight_map"),
        ({"config.json": "{}", INDEX: '{"weight_map": []}'}, "expected a weight_map"),
        ({"config.json": "{}", INDEX: '{"weight_map": {}}'}, "expected a weight_map"),
        ({"config.json": "{}", INDEX: '{"weight_map": {"a": 1}}'}, "plain name"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line_with_a_remedy(
    tmp_path: Path, content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "m"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(FileError, match=message) as caught:
        Checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_the_folder_and_a_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with pytest.raises(FileError, match="got a file"):
        Checkpoint(folder / "config.json")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(FileError, match="pipe"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "shard",
    ["../m/model-00001-of-00002.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin",
     "a\\b.safetensors", "a\0.safetensors", "..safetensors", None],
)  # fmt: skip
def test_an_index_can_name_nothing_outside_the_folder(tmp_path: Path, shard: Any) -> None:
    folder = write_model(tmp_path / "m", _halves())
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    _edit(folder / INDEX, weight_map={**weight_map, "lm_head.weight": shard})
    with pytest.raises(FileError, match=r"lm_head\.weight is said to be in .* expected the plain name"):
        Checkpoint(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    folder = write_model(tmp_path / "m", _halves())
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    _edit(folder / INDEX, weight_map={**weight_map, "lm_head.weight": second})
    with pytest.raises(FileError, match=rf"lm_head\.weight is not in {second}"):
        Checkpoint(folder)
    _edit(folder / INDEX, weight_map={**weight_map, "ghost": first})
    with pytest.raises(FileError, match=f"ghost is not in {first}"):
        Checkpoint(folder)
    _edit(
        folder / INDEX,
        weight_map={name: shard for name, shard in weight_map.items() if name != "model.steps"},
    )
    with pytest.raises(FileError, match=rf"model\.steps in {second} is not listed"):
        Checkpoint(folder)
    _edit(folder / INDEX, weight_map=weight_map)
    (folder / second).unlink()
    with pytest.raises(FileError, match=f"{second}: cannot be read"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    halves = _halves()
    halves[1]["lm_head.weight"] = halves[0]["lm_head.weight"]
    with pytest.raises(FileError, match=r"lm_head\.weight is in model-00001-of-00002\.safetensors too"):
        Checkpoint(write_model(tmp_path / "m", halves))


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / INDEX).write_text("{}")
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.index is None


def test_a_checkpoint_in_several_dtypes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": random_array((3, 5), 0, BFLOAT16),
        "b": np.array(7, np.int64),
        "c": np.zeros((0, 4), np.float16),
    }
    with Checkpoint(write_model(tmp_path / "m", [tensors])) as checkpoint:
        for name, array in tensors.items():
            assert checkpoint.tensor(name).dtype == array.dtype
            assert checkpoint.tensor(name).shape == array.shape
            assert checkpoint.tensor(name).tobytes() == array.tobytes()
