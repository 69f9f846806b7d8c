"""Run a command in a fresh process and measure it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A small process in between: Linux counts the memory of the process that forked into the child's peak.
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, time.perf_counter() - start, usage.ru_maxrss * 1024]))
"""


@dataclass(frozen=True)
class Measured:
    """Wall seconds, and the largest resident set of the process, in bytes."""

    seconds: float
    peak_bytes: int


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end.

    Raises SystemExit, with the last lines it printed, where it does not exit with 0.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, *command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **(environment or {})},
    )
    code, seconds, peak = json.loads(done.stdout)
    if code != 0:
        lines = done.stderr.splitlines()[-8:]
        raise SystemExit("\n".join([f"exit code {code}: {' '.join(command[:3])}", *lines]))
    return Measured(seconds, peak)
