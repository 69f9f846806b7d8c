"""Commands on file systems of their own: small ones, ones that fill up, and ones that become read-only."""

import subprocess
from pathlib import Path

import pytest

MOUNTING = ["unshare", "--map-root-user", "--mount", "--", "sh", "-c"]
FILLING = """
import os
from loracle.cli import main
from loracle.export import write
write_array, tensors = write.write_array, []
def filling(sink, array):
    tensors.append(array)
    if len(tensors) == 3:
        with open(os.path.join(os.environ["MOUNTED"], "filler"), "wb", 0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
    write_array(sink, array)
write.write_array = filling
main()
"""
"""The `loracle` command, for `python -c`, on a disk that is full before it writes the third tensor."""


def skip_unless_mounting() -> None:
    """Skip where a process cannot have a file system of its own."""
    try:
        tried = subprocess.run([*MOUNTING, "mount -t tmpfs none /mnt"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare command")
    if tried.returncode:
        pytest.skip(f"mounting is not permitted: {tried.stderr.decode().strip()}")


def mounted(folder: Path, options: str, arguments: list[str], before: str = "") -> list[str]:
    """A command on a file system of its own at `folder`; what is there afterwards is printed at the end."""
    script = (
        'mount -t tmpfs -o {options} none "$0" || exit 99; export MOUNTED="$0"; {before}"$@"; code=$?; '
        'ls -A "$0"; exit $code'
    )
    return [*MOUNTING, script.format(options=options, before=before), str(folder), *arguments]
