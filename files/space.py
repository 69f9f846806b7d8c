"""Whether there is room for what is to be written, asked before it is."""

import os
import shutil

from loracle.reference import FileError


def require_space(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Check that the file system of ``folder`` has ``nbytes`` free, as far as it says so.

    Quotas and what other programs write meanwhile are not known beforehand: writing can still fail.

    Raises:
        FileError: there is less, or the folder cannot be asked; the message has both numbers.
    """
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        raise FileError(f"{folder}: cannot be read ({error.strerror}); choose another --out") from None
    if usage.total and usage.free < nbytes:  # some file systems tell no size at all
        raise FileError(
            f"{folder}: expected {nbytes} bytes free, got {usage.free}; "
            "free some space or choose another --out; nothing was written"
        )
