"""A view of a tensor in a file, described and mapped again."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from loracle.files.mapped_view import MappedView
from loracle.reference import FileError

BF16 = np.dtype(ml_dtypes.bfloat16)


def written(path: Path, whole: Any, offset: int) -> Path:
    path.write_bytes(b"\x55" * offset + whole.tobytes() + b"\xaa" * 9)
    return path


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f2"), np.dtype("f4"), np.dtype("i8")], ids=str)
@pytest.mark.parametrize("offset", [0, 10, 4096, 5001])
@pytest.mark.parametrize(
    "take",
    [
        lambda a: a,
        lambda a: a.T,
        lambda a: a[2:5],
        lambda a: a[1:, 3:].T,
        lambda a: a[4],
        lambda a: a.reshape(4, 3, 5)[::2],
        lambda a: a[3:4, 2],
    ],
)
def test_a_view_is_mapped_as_it_was(tmp_path, dtype, offset, take):
    whole = np.arange(60).reshape(6, 10).astype(dtype)
    path = written(tmp_path / "data", whole, offset)
    view = MappedView.within(take(whole), whole, path, offset)
    opened = view.open()
    assert np.array_equal(opened, take(whole))
    assert (opened.dtype, opened.shape, opened.strides) == (dtype, take(whole).shape, take(whole).strides)
    assert not opened.flags.writeable
    assert view.nbytes == take(whole).nbytes
    assert hash(view) == hash(MappedView.within(take(whole), whole, path, offset))


def test_what_is_no_view_of_the_tensor_is_not_described(tmp_path):
    whole = np.arange(12.0).reshape(3, 4)
    around = np.arange(40.0)
    inner = around[8:20].reshape(3, 4)
    for other in (
        whole.copy(),
        whole + 1,
        whole[::-1],
        whole[:0],
        around[7:19].reshape(3, 4),
        around[9:21].reshape(3, 4),
    ):
        assert MappedView.within(other, inner if other.base is around else whole, tmp_path, 0) is None
    assert MappedView.within(inner, inner, tmp_path, 0) is not None


def test_a_file_that_is_too_short_or_gone_is_refused(tmp_path):
    whole = np.arange(12.0)
    path = written(tmp_path / "data", whole, 6)
    view = MappedView.within(whole, whole, path, 6)
    for length in (6 + 95, 3, 0):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(FileError, match="too short"):
            view.open()
    path.unlink()
    with pytest.raises(FileError, match="data"):
        view.open()
