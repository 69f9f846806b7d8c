"""The safetensors format, read and written: the safetensors library is the independent opinion."""

import contextlib
import json
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files_fixtures import BFLOAT16, Array, random_array
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from loracle.files import safetensors_file
from loracle.files.safetensors_file import DTYPES, SafetensorsFile
from loracle.files.safetensors_writer import safetensors_header, write_safetensors
from loracle.reference import DTypeError, FileError

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable())


@given(
    described=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=5),
    metadata=st.dictionaries(NAMES, NAMES, max_size=2),
)
def test_what_we_write_the_library_and_we_read_alike(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, Any], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("s") / "x.safetensors"
    tensors: dict[str, Array] = {}
    for seed, (name, (code, shape)) in enumerate(described.items()):
        size = int(np.prod(shape, dtype=int)) * DTYPES[code].itemsize
        data = np.random.default_rng(seed).integers(0, 2, size, np.uint8)
        tensors[name] = data.view(DTYPES[code]).reshape(shape)
    write_safetensors(path, tensors, metadata)
    ours = SafetensorsFile(path)
    with safe_open(path, framework="np") as theirs:
        assert set(theirs.keys()) == set(tensors) == set(ours.entries)
        assert (theirs.metadata() or {}) == metadata == ours.metadata
        for name, array in tensors.items():
            assert ours.tensor(name).dtype == array.dtype
            assert ours.tensor(name).shape == array.shape == tuple(theirs.get_slice(name).get_shape())
            assert ours.tensor(name).tobytes() == array.tobytes()
            assert theirs.get_slice(name).get_dtype() == described[name][0]
    assert [name for name in ours.entries if tensors[name].size] == [n for n in tensors if tensors[n].size]
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {"b": random_array((2, 3), 0), "a": np.arange(5), "c": np.float16([[1.5]])}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.tensor(name), array)


def test_arrays_that_lie_otherwise_in_memory_are_written_in_order(tmp_path: Path) -> None:
    base = random_array((4, 6), 0)
    tensors = {"t": base.T, "s": base[::2, 1::2], "z": np.float32(3).reshape(())}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.tensor(name), array)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DTypeError, match="x: safetensors has no dtype complex128"):
        write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(2, np.complex128)})
    with pytest.raises(DTypeError, match="no dtype >f4"):
        safetensors_header([("x", np.dtype(">f4"), (2,))], {})
    assert not list(tmp_path.iterdir())


def _file(path: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ATTACKS: dict[str, tuple[dict[str, Any] | str, int, int | None]] = {
    "header longer than the file": ({}, 0, 1000),
    "header longer than memory": ({}, 0, 2**63),
    "tensor past the end": ({"a": _entry(0, 8, [2])}, 4, None),
    "bytes after the last tensor": ({"a": _entry(0, 4, [1])}, 8, None),
    "hole": ({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, 12, None),
    "overlap": ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, 12, None),
    "shape larger than its bytes": ({"a": _entry(0, 4, [100])}, 4, None),
    "shape product overflows": ({"a": _entry(0, 0, [2**32, 2**32])}, 0, None),
    "negative size": ({"a": _entry(0, 4, [-1])}, 4, None),
    "end before begin": ({"a": _entry(4, 0, [1])}, 4, None),
    "unknown dtype": ({"a": _entry(0, 4, [1], "X32")}, 4, None),
    "dtype without NumPy's": ({"a": _entry(0, 8, [1], "C64")}, 8, None),
    "metadata no strings": ({"__metadata__": {"a": 1}, "b": _entry(0, 4, [1])}, 4, None),
    "no object": ("[]", 0, None),
    "no JSON": ("{", 0, None),
    "one tensor twice": ('{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 4, [1])),) * 2), 4, None),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_malformed_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    header, size, length = ATTACKS[name]
    path = _file(tmp_path / "x.safetensors", header, bytes(size), length)
    with pytest.raises(FileError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", bytes(7), bytes(8)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FileError, match="not a safetensors file"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="folder"):
        SafetensorsFile(tmp_path)


def test_releasing_pages_keeps_the_numbers(tmp_path: Path) -> None:
    tensors = {
        "a": random_array((3,), 0),
        "b": random_array((300, 100), 1),
        "c": random_array((5,), 2, BFLOAT16),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, array in tensors.items():
        view = file.tensor(name)
        file.release(name)
        assert view.tobytes() == array.tobytes()


def test_a_fingerprint_tells_headers_and_both_ends_and_the_middle_of_tensors(tmp_path: Path) -> None:
    def fingerprint(values: Array, metadata: dict[str, str] | None = None) -> str:
        path = tmp_path / "x.safetensors"
        path.unlink(missing_ok=True)
        write_safetensors(path, {"a": np.zeros(3, np.float32), "b": values}, metadata)
        file = SafetensorsFile(path)
        assert file.nbytes == path.stat().st_size
        return file.fingerprint()

    values = random_array((1001,), 0)
    found = {fingerprint(values), fingerprint(values, {"k": "v"}), fingerprint(values.reshape(1, 1001))}
    assert fingerprint(values) in found
    for place in (0, 500, 1000):
        other = values.copy()
        other[place] += 1
        found.add(fingerprint(other))
    assert len(found) == 6
    other = values.copy()
    other[250] += 1
    assert fingerprint(other) == fingerprint(values)
    empty = np.zeros((0, 4), np.float32)
    assert fingerprint(empty) == fingerprint(empty)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "malformed header entry of a; download the file again"),
        (
            {"a": _entry(0, 8, [1], "C64")},
            8,
            f"a has dtype C64, expected one of {', '.join(DTYPES)}; convert the checkpoint",
        ),
        (
            {"a": _entry(0, 0, [1] * 32 + [0])},
            0,
            "a has a shape of 33 axes that no array has; download it again",
        ),
        (
            {"a": _entry(0, 0, [0, 2**61, 2**1])},
            0,
            "a has a shape of 3 axes that no array has; download it again",
        ),
        ({"a": _entry(0, 8, [1])}, 8, "a does not lie within the file; download the file again"),
        ({"a": _entry(0, 8, [2])}, 4, "a does not lie within the file; download the file again"),
        ([], 0, "expected a JSON object, got list; restore the file"),
    ],
)
def test_what_the_library_let_through_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: Any, size: int, message: str
) -> None:
    """The file may have changed since the library has seen it, or a later library be less strict."""
    monkeypatch.setattr(safetensors_file, "safe_open", lambda *_, **__: contextlib.nullcontext())
    path = _file(tmp_path / "x.safetensors", json.dumps(header), bytes(size))
    where = f"{path} (header)" if header == [] else str(path)
    with pytest.raises(FileError, match=f"^{re.escape(f'{where}: {message}')}$"):
        SafetensorsFile(path)


def test_a_header_must_fit_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "safe_open", lambda *_, **__: contextlib.nullcontext())
    for length, fits in ((2, True), (3, False), (10, False)):
        path = _file(tmp_path / "x.safetensors", "{}", b"", length)
        if fits:
            assert SafetensorsFile(path).entries == {}
            continue
        message = f"{path}: header of {length} bytes does not fit the file; download it again"
        with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
            SafetensorsFile(path)
    monkeypatch.setattr(safetensors_file, "MAX_BYTES", 1)
    path = _file(tmp_path / "x.safetensors", "{}", b"")
    with pytest.raises(FileError, match="header of 2 bytes does not fit the file"):
        SafetensorsFile(path)


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "safe_open", lambda *_, **__: contextlib.nullcontext())
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    message = f"{path}: cannot be read (cannot mmap an empty file); check the file"
    with pytest.raises(FileError, match=f"^{re.escape(message)}$"):
        SafetensorsFile(path)


def test_shapes_of_as_many_axes_and_bytes_as_arrays_have(tmp_path: Path) -> None:
    header = {"a": _entry(0, 0, [1] * 31 + [0]), "b": _entry(0, 0, [0, 2**60], "F32"), "c": _entry(0, 4, [1])}
    file = SafetensorsFile(_file(tmp_path / "x.safetensors", json.dumps(header), bytes(4)))
    assert file.tensor("a").shape == (1,) * 31 + (0,)
    assert file.tensor("b").shape == (0, 2**60)
    assert file.tensor("c").tolist() == [0.0]


class _Map:
    """Takes down what is given back of a map of memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.advised: list[tuple[int, int, int]] = []

    def madvise(self, option: int, start: int, length: int) -> None:
        self.advised.append((option, start, length))


def test_whole_pages_of_a_tensor_are_given_back_and_no_others(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    arrays = {"big": np.zeros(3 * page, np.uint8), "small": np.zeros(5, np.uint8)}
    arrays |= {"two": np.zeros(2 * page, np.uint8), "last": np.zeros(page // 2, np.uint8)}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    seen = _Map(file.nbytes)
    file._bytes = seen  # type: ignore[assignment]
    for name, entry in file.entries.items():
        seen.advised.clear()
        file.release(name)
        pages = [
            start
            for start in range(0, entry.offset + entry.nbytes, page)
            if entry.offset <= start and start + page <= entry.offset + entry.nbytes
        ]
        expected = [(mmap.MADV_DONTNEED, pages[0], len(pages) * page)] if pages else []
        assert seen.advised == expected, name
    assert len(arrays) == len(file.entries)


def test_a_tensor_of_pages_alone_is_given_back_whole(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    text = json.dumps({"a": _entry(0, page, [page], "U8")})
    path = _file(tmp_path / "x.safetensors", text.ljust(page - 8), bytes(page))
    file = SafetensorsFile(path)
    seen = _Map(file.nbytes)
    file._bytes = seen  # type: ignore[assignment]
    file.release("a")
    assert seen.advised == [(mmap.MADV_DONTNEED, page, page)]
