"""Adapter files: onnxruntime's format with a document after it; of a broken one no byte outside is read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from refusal import refused

from loracle.export import adapter_file
from loracle.export.adapter_file import AdapterFile, check_size, document_bytes, write_parameters
from loracle.reference import ConfigError, FileError

Array = np.ndarray[Any, Any]
DOCUMENT = {"version": 1, "name": "french"}


@pytest.fixture
def arrays() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "layers.0.lora_A.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "layers.0.lora_B.weight": rng.standard_normal((7, 3)).astype(np.float16),
        "layers.1.lora_A.weight": np.zeros((0, 5), np.float32),
    }


@pytest.fixture
def path(tmp_path: Path, arrays: dict[str, Array]) -> Path:
    """A file with a document."""
    path = tmp_path / "french.onnx_adapter"
    write_parameters(path, arrays)
    with path.open("ab") as file:
        file.write(document_bytes(DOCUMENT))
    return path


def test_what_was_written_is_read_mapped_and_in_place(path: Path, arrays: dict[str, Array]) -> None:
    file = AdapterFile(path)
    assert file.document == DOCUMENT
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensors[name], array, strict=True)
        assert file.tensors[name].flags.aligned
        assert not file.tensors[name].flags.writeable


def test_onnxruntime_reads_the_file_as_it_reads_its_own(path: Path, arrays: dict[str, Array]) -> None:
    held = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert held.keys() == arrays.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(value.numpy(), arrays[name], strict=True)


def test_a_file_of_another_maker_has_no_document(path: Path, arrays: dict[str, Array]) -> None:
    write_parameters(path, arrays)
    assert AdapterFile(path).document is None


def test_equal_arrays_give_equal_bytes(tmp_path: Path, path: Path, arrays: dict[str, Array]) -> None:
    again = tmp_path / "again"
    write_parameters(again, arrays)
    assert again.read_bytes() + document_bytes(DOCUMENT) == path.read_bytes()


def test_no_changed_byte_and_no_cut_is_more_than_a_file_error(path: Path) -> None:
    """Whatever an offset, a length or a size says, an array lies in the file or is refused."""
    whole = path.read_bytes()
    broken = [whole[:end] for end in range(len(whole))]
    for at, byte in enumerate(whole):
        broken += [whole[:at] + bytes([other]) + whole[at + 1 :] for other in (255, byte ^ 128)]
    errors = 0
    for content in broken:
        path.write_bytes(content)
        try:
            file = AdapterFile(path)
        except FileError:
            errors += 1
            continue
        assert sum(array.nbytes for array in file.tensors.values()) <= len(content)
        for array in file.tensors.values():
            array.tobytes()  # every byte of it can be read
    assert errors > len(broken) / 4


def test_sizes_that_its_bytes_do_not_have_are_refused(path: Path) -> None:
    """onnxruntime would read past the end of the parameter."""
    content = path.read_bytes()
    sizes = np.array([3, 5], "<i8").tobytes()
    assert content.count(sizes) == 1
    path.write_bytes(content.replace(sizes, np.array([3, 5000], "<i8").tobytes()))
    message = (
        f"{path}: expected an adapter file of onnxruntime, got layers.0.lora_A.weight of shape (3, 5000) and "
        "float32 in 60 bytes; export the task again"
    )
    refused(lambda: AdapterFile(path), FileError, message)


def test_an_offset_that_leads_before_the_file_is_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    root = int.from_bytes(content[:4], "little")
    content[root : root + 4] = (len(content)).to_bytes(4, "little")  # where the table's fields are
    path.write_bytes(content)
    with pytest.raises(FileError, match="no parameters that can be read"):
        AdapterFile(path)


def test_two_parameters_of_one_name_are_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"layers.1.lora_A.weight", b"layers.0.lora_A.weight"))
    with pytest.raises(FileError, match=r"two of layers\.0\.lora_A\.weight"):
        AdapterFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"short", "no TORT at its fifth byte"),
        (b"\x0c\0\0\0TENT" + bytes(64), "no TORT at its fifth byte"),
        (document_bytes({"a": 1})[8:], "a document of 8 bytes"),
        (b"{]" + (2).to_bytes(8, "little") + b"\nLORACLE", "not valid JSON"),
    ],
)
def test_what_is_no_adapter_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "french.onnx_adapter"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        AdapterFile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        AdapterFile(tmp_path / "french.onnx_adapter")


def test_an_adapter_that_the_format_cannot_hold_is_refused(
    arrays: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = check_size("french", arrays)
    monkeypatch.setattr(adapter_file, "_MOST_BYTES", size)
    assert check_size("french", arrays) == size
    monkeypatch.setattr(adapter_file, "_MOST_BYTES", size - 1)
    message = (
        f"french: expected at most {size - 1} bytes, as an .onnx_adapter file can hold, got {size}; "
        "choose another --form"
    )
    refused(lambda: check_size("french", arrays), ConfigError, message)


def test_a_size_is_never_too_small(path: Path, arrays: dict[str, Array]) -> None:
    assert check_size("french", arrays) >= path.stat().st_size - len(document_bytes(DOCUMENT))


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="onnxruntime has failed to write it; is the disk full"):
        write_parameters(tmp_path / "missing" / "file", {"x": np.zeros((1, 1), np.float32)})
