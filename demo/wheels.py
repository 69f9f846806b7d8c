"""Fetch a wheel through pip, so that whatever index the user configured is the one that is asked."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from loracle.files import cache_folder
from loracle.reference import FileError

Progress = Callable[[str], None]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the expected one.

    Raises:
        FileError: the digest differs.
    """
    if (found := sha256(path)) != expected:
        raise FileError(
            f"{path.name}: expected SHA-256 {expected}, got {found}; "
            "the package index serves another file, ask its keeper or point pip at another index"
        )


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, into ``folder`` and return its path.

    Args:
        requirement: a pinned requirement, ``name==version``.
        folder: an existing folder without wheels in it.

    Raises:
        FileError: pip failed; the message has the last line that pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise FileError(
            f"{requirement}: pip download ended with code {done.returncode} ({said[-1]}); "
            "check the network and pip's index settings, then try again"
        )
    return wheels[0]


def cached_wheel(
    requirement: str, digest: str, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the path of a wheel in the cache, downloading it on the first call.

    Args:
        requirement: a pinned requirement, ``name==version``.
        digest: the wheel's SHA-256; it is checked on every call (a wheel is small beside a model).
        cache_dir: the cache's root, default :func:`cache_folder`.
        progress: called with a line of text before something slow.

    Raises:
        FileError: pip failed, or the file is another than expected.
    """
    wheels = (cache_dir or cache_folder()) / "wheels"
    kept = wheels / f"{requirement.replace('==', '-')}.whl"
    if kept.is_file() and sha256(kept) == digest:
        return kept
    wheels.mkdir(parents=True, exist_ok=True)
    if progress:
        progress(f"downloading {requirement}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=wheels) as temporary:
        wheel = download_wheel(requirement, Path(temporary))
        check_sha256(wheel, digest)
        wheel.replace(kept)
    return kept
