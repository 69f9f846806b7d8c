"""What may come of reading changed files: a value or a LoracleError, in bounded time and memory.

Everything else is a `Failure`: another exception, a warning, a file that appeared, changed or went, more than
two seconds, more memory than the process may have.
"""

import os
import random
import re
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from loracle.reference import LoracleError

from .targets import mutated, read

MOST_SECONDS = 2.0
_STUCK_SECONDS = 20
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|/\S+|\d[\d.,e+-]*|\([^()]*\)|\[[^\[\]]*\]")
_LONGEST = 90


class Failure(Exception):  # noqa: N818  the oracle's word
    """What must not happen when changed files are read."""


class Stuck(BaseException):
    """A reader does not come back; no handler of a reader's may take this for its own."""


def inputs_of(target: str, seed: int, number: int) -> dict[str, bytes]:
    """Return the files of one execution: the same for the same arguments."""
    return mutated(target, random.Random(f"{seed} {target} {number}"))


def execute(target: str, files: Mapping[str, bytes], folder: Path) -> str:
    """Read files in an otherwise empty folder, which is emptied before; return the kind of outcome.

    Returns:
        "read", or the class of the LoracleError and its message without what varies.

    Raises:
        Failure: anything but a value or a LoracleError.
    """
    lay_out(files, folder)
    before = _content(folder)
    started = time.process_time()
    try:
        with _alarm(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for harmless in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", harmless)
            read(target, folder)
        outcome = "read"
    except LoracleError as error:
        outcome = f"{type(error).__name__}: {_template(str(error), folder)}"
        if "\n" in str(error):
            raise Failure("a message of several lines") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Failure(_where(error)) from error
    seconds = time.process_time() - started
    if seconds > MOST_SECONDS:
        raise Failure(f"{seconds:.1f} seconds ({outcome})")
    if _content(folder) != before:
        raise Failure(f"the folder has changed ({outcome})")
    return outcome


def lay_out(files: Mapping[str, bytes], folder: Path) -> None:
    """Let a folder hold these files and nothing else."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    for name, content in files.items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)


def _content(folder: Path) -> list[tuple[str, int, int, int]]:
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found)


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise Stuck in the block where it takes far too long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Stuck(f"no end after {_STUCK_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _STUCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _template(message: str, folder: Path) -> str:
    return _VARIABLE.sub("*", message.replace(str(folder), ""))[:_LONGEST]


def _where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzz" not in frame.filename]
    place = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])
    return f"{type(error).__name__}: {str(error)[:200]} ({place})"
