"""Run a command in a fresh process and measure it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Wall seconds, and the largest resident set of the process or any of its children, in bytes."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end.

    Raises SystemExit, with the last lines it printed, where it does not exit with 0.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode != 0:
        lines = output.decode(errors="replace").splitlines()[-8:]
        raise SystemExit("\n".join([f"exit code {process.returncode}: {' '.join(command[:3])}", *lines]))
    return Measured(seconds, usage.ru_maxrss * 1024)
