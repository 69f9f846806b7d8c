"""Run a command in a fresh process and measure it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A small process in between: Linux counts the memory of the process that forked into the child's peak.
# /proc/PID/io is read when the process has ended and nothing has waited for it yet.
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
seconds = time.perf_counter() - start
try:
    with open(f"/proc/{process.pid}/io") as file:
        counters = dict(line.split(": ") for line in file.read().splitlines())
except OSError:
    counters = {}
_, status, usage = os.wait4(process.pid, 0)
io = [int(counters[name]) if name in counters else None for name in ("rchar", "wchar", "write_bytes")]
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024, *io]))
"""


@dataclass(frozen=True)
class Measured:
    """A process that has ended, with the children that it waited for.

    Attributes:
        seconds: wall time.
        peak_bytes: the largest resident set of one process.
        read_bytes: what it read by calls (``rchar`` of /proc/PID/io), from the disk or from the page cache;
            reading mapped files is not counted. None where the system does not tell.
        written_bytes: what it wrote by calls (``wchar``).
        dirtied_bytes: what it caused to be sent to a disk, by calls or mappings (``write_bytes``).
    """

    seconds: float
    peak_bytes: int
    read_bytes: int | None = None
    written_bytes: int | None = None
    dirtied_bytes: int | None = None


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
    code, *figures = json.loads(done.stdout)
    if code != 0:
        lines = done.stderr.splitlines()[-8:]
        raise SystemExit("\n".join([f"exit code {code}: {' '.join(command[:3])}", *lines]))
    return Measured(*figures)


def peak_of_all(command: Sequence[str], every: float = 0.05) -> int:
    """Run `command` and return the largest sum of the resident sets of it and of all processes it has started
    and they have, looked at so many seconds apart. Pages that several have mapped count once for each.

    Raises SystemExit where it does not exit with 0, or this is no Linux.
    """
    if not Path("/proc/self/statm").exists():
        raise SystemExit("expected Linux, whose /proc tells what processes take")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(every)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command[:3])}")
    return peak


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it may have ended
            for child in path.read_text().split():
                yield from _family(int(child))


def _resident(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def one_after_the_other(steps: Sequence[Measured]) -> Measured:
    """What commands that ran in turn took: sums, and the largest of their peaks."""

    def total(counts: Sequence[int | None]) -> int | None:
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    return Measured(
        sum(step.seconds for step in steps),
        max(step.peak_bytes for step in steps),
        total([step.read_bytes for step in steps]),
        total([step.written_bytes for step in steps]),
        total([step.dirtied_bytes for step in steps]),
    )


def resident_bytes() -> tuple[int, int]:
    """The proportional set size and the resident set of this process, as Linux counts them.

    The first divides a page among all mappings of it: two sessions on one file have its pages once.
    """
    proportional, resident = mapped_bytes(("Pss", "Rss"))
    return proportional, resident


def mapped_bytes(names: Sequence[str], process: int | None = None) -> list[int]:
    """Fields of Linux's smaps_rollup in bytes, of this process for None."""
    with open(f"/proc/{process or 'self'}/smaps_rollup") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line.split(" ", 1)[0])
    return [int(fields[name].split()[0]) * 1024 for name in names]
