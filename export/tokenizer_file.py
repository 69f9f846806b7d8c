"""A tokenizer in somebody's folder: whatever is wrong with it is one line that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from loracle.files.json_file import MAX_BYTES, read_regular_file
from loracle.reference import FileError

_PANIC = "PanicException"  # of pyo3, which gives the class no place to import it from
_SHOWN = 200


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`. Raises FileError: it is missing, too long, or no tokenizer."""
    if not path.is_file():
        raise FileError(f"{path}: expected a fast tokenizer's file, found none")
    content = read_regular_file(path, MAX_BYTES)
    with tokenizer_errors(path):
        return Tokenizer.from_buffer(content)


@contextmanager
def tokenizer_errors(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises in the block into a FileError that names `path`.

    It raises a bare Exception, or what pyo3 makes of a Rust panic, which is a BaseException alone.
    """
    try:
        yield
    except BaseException as error:
        if not (type(error) in (Exception, ValueError) or type(error).__name__ == _PANIC):
            raise
        raise FileError(
            f"{path}: expected a fast tokenizer's file, got one that cannot be used: {str(error)[:_SHOWN]}"
        ) from None
