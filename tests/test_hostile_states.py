"""Pickled state dicts that are made to deceive, beyond those of test_torch_foreign.py: `read_state_dict`."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from limited import run_limited

from loracle.reference import FileError
from loracle.torch_impl.state_file import read_state_dict

STATE = {"a.lora_A": torch.arange(6.0).view(2, 3), "a.lora_B": torch.ones(4, 2, dtype=torch.bfloat16)}


def saved(path: Path, value: Any, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def with_pickle(path: Path, content: bytes, *, legacy: bool) -> Path:
    """A file of torch.save whose state is what this pickle builds."""
    if legacy:
        head = b"".join(
            pickle.dumps(own, 2) for own in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        )
        path.write_bytes(head + content + pickle.dumps([], 2))
        return path
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_state_dict_is_read_bit_for_bit(tmp_path: Path, legacy: bool, kind: Any) -> None:
    state = kind(STATE)
    for value in (state, {"model": state}):
        found = read_state_dict(saved(tmp_path / "x.pt", value, legacy=legacy), inside="model")
        assert list(found) == list(STATE)
        assert found["a.lora_A"].tobytes() == np.arange(6, dtype=np.float32).tobytes()
        assert found["a.lora_A"].shape == (2, 3)
        np.testing.assert_array_equal(found["a.lora_B"], np.ones((4, 2), ml_dtypes.bfloat16), strict=True)
    with pytest.raises(FileError, match=r"got (Ordered)?[Dd]ict at 'model'"):
        read_state_dict(tmp_path / "x.pt")


def test_what_torch_saves_of_modules_and_parameters_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    assert set(read_state_dict(saved(tmp_path / "x.pt", module.state_dict()))) == {"weight", "bias"}
    assert set(read_state_dict(saved(tmp_path / "y.pt", dict(module.named_parameters())))) == {
        "weight",
        "bias",
    }
    tied = {"a": STATE["a.lora_A"], "b": STATE["a.lora_A"].t()}
    assert read_state_dict(saved(tmp_path / "z.pt", tied))["b"].shape == (3, 2)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "x.pt", STATE, legacy=legacy)
    whole = path.read_bytes()
    for end in range(0, len(whole), 5):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["value", "key", "beside"])
def test_nothing_in_a_file_is_run(tmp_path: Path, legacy: bool, where: str) -> None:
    runs = Runs(tmp_path / "ran")
    value = {"value": {"a": runs}, "key": {(1, runs): 1}, "beside": [STATE, runs]}[where]
    with pytest.raises(FileError, match="UnpicklingError"):
        read_state_dict(saved(tmp_path / "x.pt", value, legacy=legacy))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "called",
    [
        b"cposix\nsystem\n",
        b"cbuiltins\neval\n",
        b"cbuiltins\nbytearray\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nFloatTensor\n",
        b"ctorch\nTensor\n",
        b"ccollections\nCounter\n",
        b"c_codecs\nencode\n",
        b"ctorch.hub\nload\n",
        b"cos\nsystem\n",
        b"c__builtin__\nexec\n",
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_that_no_tensor_needs_is_not_made(tmp_path: Path, called: bytes, legacy: bool) -> None:
    """Some would run what the file says, others take as much memory as it says."""
    content = b"\x80\x02}X\x01\x00\x00\x00a" + called + b"\x8a\x05\x00\x00\x00\x00\x10\x85Rs."
    with pytest.raises(FileError, match="UnpicklingError"):
        read_state_dict(with_pickle(tmp_path / "x.pt", content, legacy=legacy))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("puts", [1, 2])
def test_a_key_that_takes_for_ever_is_not_looked_at(tmp_path: Path, legacy: bool, puts: int) -> None:
    """A tuple of twice the tuple before, sixty times: its hash would be computed from 2^60 parts."""
    doubled = b""
    for number in range(60):
        doubled += b"".join(b"q" + bytes([puts * number + put]) for put in range(puts))
        doubled += b"h" + bytes([puts * number + puts - 1]) + b"\x86"
    content = b"\x80\x02}K\x01\x85" + doubled + b"K\x01s."
    with pytest.raises(FileError, match="UnpicklingError"):
        read_state_dict(with_pickle(tmp_path / "x.pt", content, legacy=legacy))


def test_a_compressed_record_is_refused_by_what_it_would_become(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1 << 20)})
    small = tmp_path / "y.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert small.stat().st_size < 100_000
    with pytest.raises(FileError, match="UnpicklingError"):
        read_state_dict(small)


def test_tensors_that_share_their_numbers_take_no_more_than_four_times_the_file(tmp_path: Path) -> None:
    storage = torch.zeros(1000)
    assert len(read_state_dict(saved(tmp_path / "x.pt", {"a": storage, "b": storage[:500]}))) == 2
    with pytest.raises(FileError, match="expected a plain floating-point tensor"):
        read_state_dict(saved(tmp_path / "x.pt", {str(number): storage[number:] for number in range(50)}))


def test_a_storage_that_is_not_there_takes_no_memory(tmp_path: Path) -> None:
    """The number of a storage's entries, changed to 2^36, in both kinds of file."""
    paths = []
    for legacy in (False, True):
        path = saved(tmp_path / f"{legacy}.pt", {"a": torch.ones(77777)}, legacy=legacy)
        whole = path.read_bytes()
        count = b"J" + struct.pack("<i", 77777)
        assert count in whole
        content = whole.replace(count, b"\x8a\x05\x00\x00\x00\x00\x10")
        if not legacy:
            with zipfile.ZipFile(path) as old:
                records = {name: old.read(name) for name in old.namelist()}
            with zipfile.ZipFile(path, "w") as new:
                for name, record in records.items():
                    new.writestr(name, record.replace(count, b"\x8a\x05\x00\x00\x00\x00\x10"))
        else:
            path.write_bytes(content)
        paths.append(path)
    code = """
import sys
from pathlib import Path
from loracle.reference import FileError
from loracle.torch_impl.state_file import read_state_dict
limit(memory=2**30)
for path in sys.argv[1:]:
    try:
        read_state_dict(Path(path))
    except FileError as error:
        print("refused")
"""
    assert run_limited(code, *paths) == "refused\nrefused\n"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "absent", "."):
        with pytest.raises(FileError, match="no such file"):
            read_state_dict(tmp_path / name)
