"""Whether a file of a folder lies there, and not somewhere else that a link leads to."""

import os
from pathlib import Path

from loracle.reference import FileError


def require_contained(folder: Path, name: str) -> None:
    """Check that ``name`` is a file of ``folder``, also where it is a link; the file need not be there.

    A link may lead to another file of the folder, and into the ``blobs`` folder of the hub's cache.

    Raises:
        FileError: it leads anywhere else, so that a downloaded folder could draw in other files.
    """
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(folder / name))
    # the hub's cache: <repository>/snapshots/<revision>/<name> links to <repository>/blobs/<hash>
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and (blobs is None or real.parent != blobs):
        raise FileError(
            f"{folder / name}: links to {real}, outside the model's folder; copy the file into it"
        )
