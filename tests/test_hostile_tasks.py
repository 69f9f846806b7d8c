"""Tasks of deployments that are made to deceive: their files, documents and records."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fuzz import seeds
from refusal import read_or_refused

from loracle.export.adapter_file import AdapterFile, document_bytes
from loracle.export.deployed_tasks import deployed_tasks, manifest
from loracle.export.loaded_task import map_task
from loracle.export.names import TASK_KEY
from loracle.export.task_document import parse_document
from loracle.export.task_names import find_tasks
from loracle.export.verified import read_verified
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import FileError

TASK = "x.task.safetensors"
PARAMETERS = "x.onnx_adapter"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in seeds.deployments()[0].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def document(**changes: Any) -> str:
    return json.dumps({**seeds.DOCUMENT, **changes})


@pytest.mark.parametrize(
    "text",
    [
        document(r=[[1]]),
        document(r=[1, 1]),
        document(r=[True]),
        document(r=[0]),
        document(lora_alpha=10**400),
        document(lora_alpha="1"),
        document(target_modules=[[[1]]]),
        document(target_modules=["b", "a"]),
        document(sha256="F" * 64),
        document(sha256=["f"] * 64),
        document(bytes=-1),
        document(bytes=1.0),
        document(version=True),
        document(form=["swappable"]),
        document(extra={"a": 1}),
        document()[:-1] + ', "bytes": 1}',
        "[" * 100_000,
        document(r=json.loads("[" * 90 + "]" * 90)),
        '{"\udc80": 1}',
        "",
    ],
)
def test_a_document_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"^source") as caught:
        parse_document(text, "source")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name", [TASK, "y.onnx_adapter", "z.onnx", "model.onnx", "model.onnx_data", "s.safetensors"]
)
def test_a_deployment_with_a_file_cut_anywhere_is_read_or_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    assert {task.name for task in deployed_tasks(folder)} == {"x", "y", "z"}
    refusals = 0
    for end in range(0, len(whole), max(1, len(whole) // 40)):
        (folder / name).write_bytes(whole[:end])
        refusals += read_or_refused(lambda: manifest(folder)) is not None
    assert refusals


@pytest.mark.parametrize(
    "tensor",
    [
        np.ones(2, ml_dtypes.bfloat16),
        np.ones(2, ml_dtypes.float8_e4m3fn),
        np.ones(2, ml_dtypes.float8_e5m2),
    ],
)
def test_a_dtype_that_onnxruntime_does_not_take_is_refused(tmp_path: Path, tensor: Any) -> None:
    write_safetensors(tmp_path / TASK, {"w": tensor})
    with pytest.raises(FileError, match="w: expected a dtype that onnxruntime takes from NumPy"):
        map_task(tmp_path / TASK, (), "cpu")


def test_every_dtype_of_numpys_own_is_mapped(tmp_path: Path) -> None:
    tensors = {
        str(number): np.ones((2, 3), dtype)
        for number, dtype in enumerate(
            ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
        )
    }
    write_safetensors(tmp_path / TASK, {**tensors, "empty": np.zeros((0, 3), np.float32)})
    loaded = map_task(tmp_path / TASK, (), "cpu")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded.weights[name].numpy(), tensor)
    assert loaded.weights["empty"].shape() == [0, 3]


def test_every_flipped_bit_of_a_parameter_file_is_refused_or_read(folder: Path) -> None:
    """`test_export_adapter_file.py` changes bytes; here it is bits."""
    path = folder / "y.onnx_adapter"
    whole = path.read_bytes()
    refusals = 0
    for bit in range(8 * (len(whole) - 64)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors = AdapterFile(path).tensors
        except FileError:
            refusals += 1
            continue
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(whole)
    assert refusals > len(whole)


def names_on_one_another(count: int) -> bytes:
    """A file of parameters without numbers, whose names are much of the file, each from another byte on."""
    body = bytearray(8)

    def put(content: bytes) -> int:
        body.extend(bytes(-len(body) % 8))
        at = len(body)
        body.extend(content)
        return at

    def refer(at: int, target: int) -> None:
        struct.pack_into("<I", body, at, target - at)

    root_fields = put(struct.pack("<6H", 12, 12, 4, 0, 0, 8))  # a table's size, its fields': where each is
    fields = put(struct.pack("<6H", 12, 20, 4, 8, 12, 16))
    root = put(struct.pack("<iii", 0, 1, 0))
    struct.pack_into("<i", body, root, root - root_fields)
    vector = put(struct.pack("<I", count) + bytes(4 * count))
    refer(root + 8, vector)
    tables = [put(struct.pack("<iiiii", 0, 0, 0, 1, 0)) for _ in range(count)]
    sizes, data = put(struct.pack("<Iq", 1, 0)), put(struct.pack("<I", 0))
    lengths = [8 * (count - number) + 100 for number in range(count)]
    lengths = [length - length % 256 + min(length % 256, 127) for length in lengths]  # they are texts as well
    names = [put(struct.pack("<I", length)) for length in lengths]
    put(b"n" * 104)
    for number, table in enumerate(tables):
        refer(vector + 4 + 4 * number, table)
        struct.pack_into("<i", body, table, table - fields)
        for field, target in ((4, names[number]), (8, sizes), (16, data)):
            refer(table + field, target)
    struct.pack_into("<I", body, 0, root)
    body[4:8] = b"TORT"
    return bytes(body)


def test_names_that_lie_on_one_another_take_no_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / PARAMETERS
    path.write_bytes(names_on_one_another(1))
    assert [tensor.shape for tensor in AdapterFile(path).tensors.values()] == [(0,)]
    path.write_bytes(names_on_one_another(200))
    with pytest.raises(FileError, match="more names than bytes"):
        AdapterFile(path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", "", "x" * 101, ".hidden", "model", "a\0b", "a/b", "é"]
)
def test_a_file_of_a_name_that_no_task_has_is_no_task(tmp_path: Path, name: str) -> None:
    for suffix in (".onnx", ".task.safetensors", ".onnx_adapter"):
        if name and not set(name) & set("/\0") and name not in (".", ".."):
            (tmp_path / f"{name}{suffix}").write_bytes(b"x")
    assert [found for found, _ in find_tasks(tmp_path)] == []


def test_what_is_no_file_is_no_task_that_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / TASK)
    (tmp_path / "folder.onnx_adapter").mkdir()
    for path in (tmp_path / TASK, tmp_path / "folder.onnx_adapter"):
        with pytest.raises(FileError, match="expected a file, got a folder, pipe or device"):
            map_task(path, (), "cpu")


@pytest.mark.parametrize(
    "record",
    [
        {"checks": [[]]},
        {"checks": [{"name": {}, "figure": []}]},
        {"largest_error": 10**400},
        {"versions": []},
        {"sha256": "0" * 64},
        {"version": 2},
        {"more": 1},
    ],
)
def test_a_record_that_is_none_is_nobodys(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "x.verified.json"
    path.write_text(json.dumps(seeds.RECORD))
    assert read_verified(tmp_path, "x", "f" * 64) is not None
    path.write_text(json.dumps({**seeds.RECORD, **record}))
    assert read_verified(tmp_path, "x", "f" * 64) is None


def test_a_document_in_a_header_is_read_as_strictly(tmp_path: Path, folder: Path) -> None:
    for text in ("[" * 100_000, document(r=[[1]]), "\0"):
        (folder / TASK).unlink()
        write_safetensors(folder / TASK, {"w": np.ones(2, np.float32)}, {TASK_KEY: text})
        with pytest.raises(FileError, match=r"x\.task\.safetensors \(header\)"):
            deployed_tasks(folder)
    (folder / TASK).unlink()
    whole = (folder / "y.onnx_adapter").read_bytes()
    (folder / "y.onnx_adapter").write_bytes(whole + document_bytes({"version": 1}))
    with pytest.raises(FileError, match=r"y\.onnx_adapter \(document\)"):
        deployed_tasks(folder)
