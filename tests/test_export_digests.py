"""Digests are those of the files' bytes, each file is read once, and which files they are is known."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from files_fixtures import write_model
from onnx import helper, numpy_helper

from loracle.export.external import load_graph
from loracle.export.verification import digests as module
from loracle.export.verification.digests import Digests, FileDigest, InputDigest, InputFiles
from loracle.export.verification.input_files import adapter_files, checkpoint_files, onnx_files
from loracle.files import Checkpoint
from loracle.reference import FileError

BLOCK = 1 << 20


def _files(folder: Path, **content: bytes) -> dict[str, Path]:
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in content}


def digest_files(files: dict[str, Path]) -> tuple[FileDigest, ...]:
    """The digest of each."""
    with Digests() as running:
        running.add(InputFiles("base", "checkpoint", "x", files))
        return running.wait()[0].files


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_digest_is_that_of_all_bytes(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (found,) = digest_files(_files(tmp_path, one=data))
    assert found == FileDigest("one", size, hashlib.sha256(data).hexdigest())


def test_the_digest_of_a_folder_is_what_sha256sum_makes_of_it(tmp_path: Path) -> None:
    names = ("b", "a", "z\\y", "line\nbreak", "ü", "sub.c")
    files = _files(tmp_path, **{name: name.encode() for name in names})
    found = InputDigest("base", "checkpoint", str(tmp_path), digest_files(files))
    assert [file.name for file in found.files] == list(names)
    assert found.size == sum(len(name.encode()) for name in names)
    command = ["bash", "-c", 'set -o pipefail; sha256sum -- "$@" | LC_ALL=C sort | sha256sum', "-", *names]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.sha256 == said.split()[0]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a b", "a b"), ("a\rb", "a\\rb"), ("a\nb", "a\\nb"), ("a\\nb", "a\\\\nb"), ("\udcff", "\udcff")],
)
def test_a_line_is_that_of_sha256sum(name: str, shown: str) -> None:
    mark = "\\" if shown != name else ""
    line = FileDigest(name, 1, "ab" * 32).line()
    assert line == f"{mark}{'ab' * 32}  {shown}\n".encode("utf-8", "surrogateescape")


def test_a_digest_in_json() -> None:
    found = InputDigest(
        "base", "onnx", "a/b", (FileDigest("one", 3, "c" * 64), FileDigest("two", 4, "d" * 64))
    )
    whole = hashlib.sha256(f"{'c' * 64}  one\n{'d' * 64}  two\n".encode()).hexdigest()
    assert found.to_json() == {
        **{"name": "b", "path": "a/b", "kind": "onnx", "bytes": 7, "sha256": whole},
        "files": [
            {"name": "one", "bytes": 3, "sha256": "c" * 64},
            {"name": "two", "bytes": 4, "sha256": "d" * 64},
        ],
    }


@pytest.mark.parametrize(("path", "name"), [("a/b", "b"), ("a/b/", "b"), (".", None), ("/", "/")])
def test_an_input_has_the_name_of_its_folder(path: str, name: str | None) -> None:
    expected = Path.cwd().name if name is None else name
    assert InputDigest("base", "checkpoint", path, ()).name == expected


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that have been begun to be read."""
    names: list[str] = []
    whole = module._digest

    def digest(path: Path, left: threading.Event) -> tuple[int, str]:
        names.append(path.name)
        return whole(path, left)

    monkeypatch.setattr(module, "_digest", digest)
    return names


def test_a_file_of_several_inputs_is_read_once(tmp_path: Path, read: list[str]) -> None:
    files = _files(tmp_path, one=b"1", two=b"2")
    os.link(files["one"], tmp_path / "hard")
    (tmp_path / "soft").symlink_to("one")
    with Digests(2) as running:
        running.add(InputFiles("base", "checkpoint", "x", files))
        running.add(InputFiles("candidate", "onnx", "y", {n: tmp_path / n for n in ("hard", "soft", "two")}))
        base, candidate = running.wait()
    assert sorted(read) == ["one", "two"]
    assert (base.role, candidate.role, candidate.kind, candidate.path) == ("base", "candidate", "onnx", "y")
    assert [file.sha256 for file in candidate.files] == [base.files[i].sha256 for i in (0, 0, 1)]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


BAD: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": _pipe,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    BAD[kind](tmp_path / "bad")
    files = {**_files(tmp_path, good=b"1"), "bad": tmp_path / "bad"}
    with pytest.raises(FileError, match=f"^{tmp_path / 'bad'}: "):
        digest_files(files)


def test_a_read_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise OSError(5, "Input/output error")

    files = _files(tmp_path, one=b"1")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FileError, match=r"one: cannot be read \(Input/output error\)"):
        digest_files(files)


@pytest.mark.parametrize("threads", [1, 3])
def test_so_many_files_are_read_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    reading, most, lock = 0, 0, threading.Lock()

    def digest(path: Path, left: threading.Event) -> tuple[int, str]:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        time.sleep(0.05)
        with lock:
            reading -= 1
        return 0, ""

    monkeypatch.setattr(module, "_digest", digest)
    with Digests(threads) as running:
        running.add(InputFiles("base", "checkpoint", "x", _files(tmp_path, **dict.fromkeys("abcdef", b""))))
        running.wait()
    assert most == threads


def test_reading_ends_where_the_block_does(tmp_path: Path, read: list[str]) -> None:
    """Of a large file that nobody waits for a part is read, and of those behind it nothing."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    files = {"large": tmp_path / "large", **_files(tmp_path, after=b"1")}
    with Digests(1) as running:
        running.add(InputFiles("base", "checkpoint", "x", files))
        while not read:
            time.sleep(0.001)
    assert read == ["large"]


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    shards = [{name: np.zeros((2, 3), np.float32)} for name in ("a.weight", "b.weight")]
    folder = write_model(tmp_path / "model", shards)
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin", "other.safetensors"):
        (folder / name).write_text("x")
    with Checkpoint(folder) as checkpoint:
        found = checkpoint_files(checkpoint, "base", "given")
    assert (found.role, found.kind, found.path) == ("base", "checkpoint", "given")
    assert list(found.files) == [
        *("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        *("model-00002-of-00002.safetensors", "tokenizer.json"),
    ]
    assert all(path == folder / name for name, path in found.files.items())


def test_a_checkpoint_of_one_file_has_no_index(tmp_path: Path) -> None:
    with Checkpoint(write_model(tmp_path / "model")) as checkpoint:
        assert list(checkpoint_files(checkpoint, "base", "x").files) == ["config.json", "model.safetensors"]


def test_the_files_of_an_adapter(tmp_path: Path) -> None:
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.json",
        "vocab.txt",
        "optimizer.pt",
    ):
        (tmp_path / name).write_text("x")
    names = ("adapter_config.json", "adapter_model.safetensors", "head.json", "vocab.txt")
    expected = InputFiles("adapter", "adapter", str(tmp_path), {name: tmp_path / name for name in names})
    assert adapter_files(tmp_path) == expected
    one = tmp_path / "lora.pt"
    one.write_text("x")
    found = adapter_files(str(one))
    assert (found.role, found.kind, found.path, found.files) == (
        "adapter",
        "adapter",
        str(one),
        {"lora.pt": one},
    )


def _graph(folder: Path, name: str, data: str) -> Path:
    """A graph whose only tensors lie in data files: one an initializer, one in a node."""
    tensors = []
    for index, file in enumerate((data, f"{data}.more")):
        tensor = numpy_helper.from_array(np.zeros(4, np.float32), f"w{index}")
        onnx.external_data_helper.set_external_data(tensor, file, 0, 16)
        tensor.ClearField("raw_data")
        (folder / file).write_bytes(bytes(16))
        tensors.append(tensor)
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensors[1]),
        helper.make_node("Add", ["w0", "c"], ["y"]),
    ]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    model = helper.make_model(helper.make_graph(nodes, "g", [], [out], [tensors[0]]))
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def test_the_files_of_a_graph(tmp_path: Path) -> None:
    graphs = [_graph(tmp_path, name, f"{name}_data") for name in ("one.onnx", "two.onnx")]
    for name in ("config.json", "tokenizer.json", "three.onnx", "README.md", "task"):
        (tmp_path / name).write_text("x")
    models = {path: load_graph(path) for path in graphs}
    found = onnx_files(models, tmp_path, [tmp_path / "task"], "task")
    data = [f"{name}_data{more}" for name in ("one.onnx", "two.onnx") for more in ("", ".more")]
    assert list(found.files) == ["one.onnx", "two.onnx", "task", *data, "config.json", "tokenizer.json"]
    assert (found.role, found.kind, found.path) == ("candidate", "task", str(tmp_path))
    assert onnx_files({graphs[0]: models[graphs[0]]}, "x").kind == "onnx"


def _three(folder: Path) -> list[Callable[[], Any]]:
    with Checkpoint(folder) as checkpoint:
        return [
            lambda: checkpoint_files(checkpoint, "base", folder),
            lambda: adapter_files(folder),
            lambda: onnx_files({folder / "model.onnx": load_graph(folder / "model.onnx")}, folder),
        ]


@pytest.mark.parametrize("which", range(3))
def test_a_tokenizer_from_outside_the_folder_is_refused(tmp_path: Path, which: int) -> None:
    """Its digest would tell of a file that is none of the user's business with this folder."""
    folder = write_model(tmp_path / "model")
    _graph(folder, "model.onnx", "data")
    (tmp_path / "secret").write_text("x")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(FileError, match=r"tokenizer\.json"):
        _three(folder)[which]()
    (folder / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "secret", folder / "inside")
    (folder / "tokenizer.json").symlink_to("inside")
    assert "tokenizer.json" in _three(folder)[which]().files
