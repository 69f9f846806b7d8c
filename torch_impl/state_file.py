"""A state dict in a pickled file of torch, whoever made it: arrays by name, nothing in the file is run.

``torch.load(weights_only=True)`` runs nothing either, but what it builds may take for ever or all memory: a
tuple of the same tuple twice, and so on, as a key; a compressed record; a call that only allocates. A state
dict of plain tensors has none of it, so the pickle is read over before it is loaded.
"""

import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from loracle.files.json_file import check_regular_file
from loracle.reference import FileError

from .arrays import array_of

# What reading a file that is no pickle, a cut one, or one made to deceive has been seen to raise.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    ImportError,
    MemoryError,
    struct.error,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # a magic number, a version, the system's sizes, the state, the storages' keys
_GLOBALS = re.compile(
    r"collections OrderedDict|torch (?:\w+Storage|Size|device|bool|(?:b?float|u?int|complex)\d+)"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|torch\._utils _rebuild_\w+"
)
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_PUTS = {"BINPUT", "LONG_BINPUT"}
_GETS = {"BINGET", "LONG_BINGET"}
_SHARED = 4
"""How many times the file's bytes all tensors may have together: several may be views of one storage."""


def read_state_dict(path: Path, *, inside: str | None = None) -> dict[str, NDArray[Any]]:
    """Return the tensors of the state dict that ``torch.save`` wrote to ``path``, as arrays by name.

    Args:
        path: the file.
        inside: the one key of a dict that the state dict may be the value of.

    Returns:
        float16, bfloat16, float32 and float64 arrays, of the shapes of the tensors; bfloat16 is ml_dtypes'.

    Raises:
        FileError: the file cannot be read, holds something else than a dict of names and plain tensors of
            these dtypes, or claims more numbers than it has.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file; check the path")
    size = check_regular_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_pickles(path, size)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise FileError(
            f"{path}: expected a file of torch.save with tensors alone, got one that can't be read as such "
            f"({type(error).__name__}); save the state dict again"
        ) from None
    if not isinstance(state, Mapping):
        raise FileError(f"{path}: expected a dict of tensors, got {type(state).__name__}; save a state dict")
    inner = None if inside is None or len(state) != 1 else state.get(inside)
    return _arrays(path, inner if isinstance(inner, Mapping) else state, _SHARED * size)


def _check_pickles(path: Path, size: int) -> None:
    """Raise UnpicklingError where the file's pickles build what no state dict of plain tensors has."""
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
            return
    archive = torch._C.PyTorchFileReader(str(path))
    if sum(map(archive.get_record_size, archive.get_all_records())) > size:
        raise pickle.UnpicklingError("records that are larger than the file")
    _check_pickle(archive.get_record("data.pkl"))


def _check_pickle(content: bytes | IO[bytes]) -> None:
    last, tuples = "", set()
    for name, value in _operations(content):
        if name == "GLOBAL" and not _GLOBALS.fullmatch(value):
            raise pickle.UnpicklingError(f"a call of {value}")
        if name in _PUTS and last in _TUPLES:
            tuples.add(value)
        if name in _GETS and value in tuples:
            raise pickle.UnpicklingError("a tuple that is used twice")
        if name not in _PUTS:
            last = name


def _operations(content: bytes | IO[bytes]) -> Iterator[tuple[str, Any]]:
    for operation, value, _ in pickletools.genops(content):
        yield operation.name, value


def _arrays(path: Path, state: Mapping[Any, Any], most: int) -> dict[str, NDArray[Any]]:
    """Return the tensors as arrays by name; all together of at most ``most`` bytes.

    Raises:
        FileError: a name is no string, or a value no plain tensor of numbers that are in the file.
    """
    arrays = {}
    total = 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FileError(
                f"{path}: expected a dict of names and tensors, got {type(value).__name__} at {name!r:.80}; "
                "save a state dict"
            )
        nbytes = value.numel() * value.element_size()
        total += nbytes
        # A view of few numbers may claim any shape, and take that much memory once it is computed with.
        if (
            value.layout is not torch.strided
            or value.device.type != "cpu"
            or value.dtype not in _FLOATS
            or nbytes > value.untyped_storage().nbytes()
            or total > most
        ):
            raise FileError(
                f"{path}: {name}: expected a plain floating-point tensor, got {value.dtype} {value.layout} "
                f"of shape {tuple(value.shape)} on {value.device.type}; save it dense, on the CPU"
            )
        arrays[name] = array_of(value)
    return arrays
