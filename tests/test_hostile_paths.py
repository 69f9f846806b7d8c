"""Files that are no files, links that lead out, outputs that are inputs: nothing is read or lost by them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from files_fixtures import small_adapter, small_tensors, write_model

from loracle.export.exporter import export
from loracle.files import Checkpoint, read_adapter, write_adapter, write_merged_checkpoint
from loracle.files.contained import require_contained
from loracle.reference import FileError, LoracleError

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


def halves() -> list[dict[str, object]]:
    items = list(small_tensors().items())
    return [dict(items[:2]), dict(items[2:])]


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def moved(path: Path, place: Path) -> None:
    """Let a link to another place stand where a file was."""
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, place)
    path.symlink_to(os.path.relpath(place, path.parent))


@pytest.mark.parametrize("place", ["outside/x.safetensors", "x.safetensors", "blobs/x", "blobs/deep/x"])
def test_a_shard_named_in_an_index_may_not_lie_outside(tmp_path: Path, place: str) -> None:
    folder = write_model(tmp_path / "m", halves())  # type: ignore[arg-type]
    moved(folder / SHARD, tmp_path / place)
    with pytest.raises(FileError, match=rf"{SHARD}: links to .*, outside the model's folder; copy the file"):
        Checkpoint(folder)


def test_a_shard_in_the_hubs_cache_and_one_that_is_another_file_of_the_folder_are_read(
    tmp_path: Path,
) -> None:
    """<repository>/snapshots/<revision>/<name> links to <repository>/blobs/<hash>."""
    (tmp_path / "repo" / "snapshots").mkdir(parents=True)
    folder = write_model(tmp_path / "repo" / "snapshots" / "rev", halves())  # type: ignore[arg-type]
    for path in list(folder.iterdir()):
        moved(path, tmp_path / "repo" / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest())
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.names) == set(small_tensors())
    (tmp_path / "link").symlink_to(folder)
    with Checkpoint(tmp_path / "link") as checkpoint:
        assert checkpoint.index is not None
    other = write_model(tmp_path / "m", halves())  # type: ignore[arg-type]
    moved(other / SHARD, other / "real.safetensors")
    with Checkpoint(other) as checkpoint:
        assert len(checkpoint.shards) == 2


def test_the_names_that_the_program_itself_looks_for_may_be_links_of_the_users(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    moved(folder / "model.safetensors", tmp_path / "disk" / "x.safetensors")
    adapter = tmp_path / "a"
    write_adapter(adapter, small_adapter())
    moved(adapter / "adapter_model.safetensors", tmp_path / "disk" / "y.safetensors")
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.names
    assert read_adapter(adapter).pairs


@pytest.mark.parametrize("name", ["a/../../x", "../x", "/etc/passwd"])
def test_a_name_that_leads_out_is_not_contained(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError, match="outside the model's folder"):
        require_contained(tmp_path, name)
    require_contained(tmp_path, "absent")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _endless(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("kind", [_pipe, _device, _endless, _dangling, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_what_is_no_file_of_a_checkpoint_is_refused(
    tmp_path: Path, kind: Callable[[Path], None], name: str
) -> None:
    """None of them blocks or reads on for ever."""
    folder = write_model(tmp_path / "m", halves())  # type: ignore[arg-type]
    (folder / name).unlink()
    kind(folder / name)
    with pytest.raises(FileError, match=f"{folder}") as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [_pipe, _device, _endless, Path.mkdir])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "head.json"])
def test_what_is_no_file_of_an_adapter_is_refused(
    tmp_path: Path, kind: Callable[[Path], None], name: str
) -> None:
    write_adapter(tmp_path / "a", small_adapter())
    (tmp_path / "a" / name).unlink(missing_ok=True)
    kind(tmp_path / "a" / name)
    if (kind, name) == (_endless, "head.json"):
        read_adapter(tmp_path / "a")  # where it leads there is none
        return
    with pytest.raises(FileError, match=f"{tmp_path}"):
        read_adapter(tmp_path / "a")


def test_a_hard_link_is_a_file_of_its_folder(tmp_path: Path) -> None:
    """It has no other home to lead to, and whoever made it could have made a copy."""
    folder = write_model(tmp_path / "m")
    os.link(folder / "model.safetensors", tmp_path / "other")
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.names


@pytest.mark.parametrize("out", ["m", "a", "m/config.json", "a/adapter_config.json", "link"])
def test_a_merge_into_an_input_is_refused_and_leaves_it(tmp_path: Path, out: str) -> None:
    base = write_model(tmp_path / "m")
    write_adapter(tmp_path / "a", small_adapter())
    (tmp_path / "link").symlink_to("m")
    before = content(tmp_path)
    with pytest.raises(LoracleError, match=r"exists and is not empty|does not exist"):
        write_merged_checkpoint(base, tmp_path / "a", tmp_path / out)
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a", "link"}


@pytest.mark.parametrize("out", ["m", "a", "m/config.json", "link"])
def test_an_export_into_an_input_is_refused_and_leaves_it(tmp_path: Path, out: str) -> None:
    base = write_model(
        tmp_path / "m",
        config={"architectures": ["LlamaForCausalLM"], "hidden_size": 6, "num_attention_heads": 1},
    )
    write_adapter(tmp_path / "a", small_adapter())
    (tmp_path / "link").symlink_to("m")
    before = content(tmp_path)
    with pytest.raises(LoracleError, match=r"exists and is not empty|does not exist"):
        export(base, tmp_path / out, tmp_path / "a")
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a", "link"}


def test_an_output_inside_an_input_leaves_its_files(tmp_path: Path) -> None:
    base = write_model(tmp_path / "m")
    write_adapter(tmp_path / "a", small_adapter())
    before = content(base)
    write_merged_checkpoint(base, tmp_path / "a", base / "merged")
    assert content(base).items() >= before.items()
    with Checkpoint(base / "merged") as checkpoint:
        assert set(checkpoint.names) == set(small_tensors())


def test_a_refused_input_leaves_no_output(tmp_path: Path) -> None:
    base = write_model(tmp_path / "m", halves())  # type: ignore[arg-type]
    write_adapter(tmp_path / "a", small_adapter())
    shutil.copytree(base, tmp_path / "n")
    index = json.loads((tmp_path / "n" / INDEX).read_text())
    index["weight_map"]["ghost"] = "../m/" + SHARD
    (tmp_path / "n" / INDEX).write_text(json.dumps(index))
    before = content(tmp_path)
    with pytest.raises(FileError, match="plain name"):
        write_merged_checkpoint(tmp_path / "n", tmp_path / "a", tmp_path / "out")
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()
