"""Where things that can be made again are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$LORACLE_CACHE``, or ``loracle`` in the user's cache folder; it need not exist yet."""
    if chosen := os.environ.get("LORACLE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loracle"
