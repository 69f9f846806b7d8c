"""Safetensors files that are made to deceive, beyond those of test_files_safetensors.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, random_array
from limited import run_limited

from loracle.files.safetensors_file import DTYPES, SafetensorsFile
from loracle.files.safetensors_writer import write_safetensors
from loracle.reference import FileError, LoracleError


def with_header(path: Path, header: dict[str, Any] | str, data: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def small(path: Path) -> bytes:
    tensors = {
        "a": random_array((2, 3), 0),
        "b": random_array((2,), 1, BFLOAT16),
        "c": np.zeros((0, 2), np.int8),
    }
    write_safetensors(path, tensors, {"format": "pt"})
    return path.read_bytes()


def entry(shape: list[Any], nbytes: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = small(path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError) as caught:
            SafetensorsFile(path)
        assert str(caught.value).startswith(str(path))


def test_every_flipped_bit_of_a_header_is_refused_or_read_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = small(path)
    end = 8 + int.from_bytes(whole[:8], "little")
    refusals = 0
    for bit in range(8 * end):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            file = SafetensorsFile(path)
        except FileError:
            refusals += 1
            continue
        header = json.loads(flipped[8:end])
        assert file.metadata == header.pop("__metadata__", {})
        assert file.entries.keys() == header.keys()
        for name, own in header.items():
            first, last = own["data_offsets"]
            tensor = file.tensor(name)
            assert (tensor.dtype, list(tensor.shape)) == (DTYPES[own["dtype"]], own["shape"])
            assert tensor.tobytes() == flipped[end + first : end + last]
    assert 4 * end < refusals < 8 * end, "most flips are seen, and not every one"


@pytest.mark.parametrize("length", [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 10**8 + 1])
def test_a_header_of_any_claimed_length_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(FileError, match="not a safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ([1] * 33, 4),
        ([1] * 65, 4),
        ([1] * 5000, 4),
        ([0, 2**62, 2**62], 0),
        ([0, 2**63 - 1], 0),
        ([2**63 - 1, 0], 0),
        ([0, 2**61], 0),
    ],
)
def test_a_shape_that_no_array_has_is_refused_also_without_entries(
    tmp_path: Path, shape: list[int], nbytes: int
) -> None:
    path = with_header(tmp_path / "x.safetensors", {"a": entry(shape, nbytes)}, bytes(nbytes))
    with pytest.raises(FileError, match=r"a shape of \d+ axes that no array has|not a safetensors file"):
        SafetensorsFile(path)


def test_unusual_shapes_that_arrays_have_are_read(tmp_path: Path) -> None:
    for shape in ([], [0], [0, 2**40], [1] * 32):
        nbytes = 0 if 0 in shape else 4
        path = with_header(tmp_path / "x.safetensors", {"a": entry(shape, nbytes)}, bytes(nbytes))
        assert list(SafetensorsFile(path).tensor("a").shape) == shape


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([-1, -1], 4)},
        {"a": entry([1.0], 4)},
        {"a": entry([True], 4)},
        {"a": entry(["1"], 4)},
        {"a": entry([2**64], 4)},
        {"a": entry([2**32, 2**31, 2], 4)},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**64]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": None, "shape": [1], "data_offsets": [0, 4]}},
        {"a": []},
        {"a": ["F32", [1], [0, 4]]},
        {"__metadata__": []},
        '{"a": %s, "a": %s}' % ((json.dumps(entry([1], 4)),) * 2),
        '{"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"__metadata__": {"k": "1", "k": "2"}, "a": ' + json.dumps(entry([1], 4)) + "}",
        r'{"\ud800": ' + json.dumps(entry([1], 4)) + "}",
        "[" * 100_000,
        '{"a":' * 5000,
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: Any) -> None:
    path = with_header(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(LoracleError):
        SafetensorsFile(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "a\nb", "x" * 10_000])
def test_a_tensor_may_have_any_name_for_none_is_a_path(tmp_path: Path, name: str) -> None:
    path = with_header(tmp_path / "x.safetensors", {name: entry([1], 4)}, bytes(4))
    assert list(SafetensorsFile(path).entries) == [name]


def test_data_that_only_claim_to_be_there_take_no_memory(tmp_path: Path) -> None:
    """A file with a hole of 64 GiB, opened and looked at in little memory: its pages are never all there."""
    path = with_header(tmp_path / "x.safetensors", {"a": entry([2**34], 2**36)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**36)
    code = """
import sys
from pathlib import Path
from loracle.files.safetensors_file import SafetensorsFile
limit(memory=2**36 + 2**30)
file = SafetensorsFile(Path(sys.argv[1]))
file.fingerprint()
print(file.tensor("a").nbytes, int(Path("/proc/self/statm").read_text().split()[1]) * 4096 < 2**29)
"""
    assert run_limited(code, path).split() == [str(2**36), "True"]
