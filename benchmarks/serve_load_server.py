"""The server under load: `loracle serve` in a process of its own, and the memory that it takes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .process import mapped_bytes

_END_SECONDS = 60


@dataclass(frozen=True)
class Memory:
    """One sample, in bytes.

    Attributes:
        seconds: since the server started.
        resident: its resident set.
        anonymous: of that, what is no file: what a leak would be in.
        proportional: the resident set, with pages that other processes have too divided among them. It moves
            when others come and go.
    """

    seconds: float
    resident: int
    anonymous: int
    proportional: int


@dataclass(frozen=True)
class Trend:
    """How memory goes after the warm-up.

    Attributes:
        start, end: bytes, medians of the first and the last quarter of the samples.
        per_minute: bytes, the slope of a straight line through all.
        growth: of that line over the time that was sampled, as a share of `start`.
    """

    start: int
    end: int
    per_minute: float
    growth: float


class ServerProcess:
    """`loracle serve` on a free port of the loopback.

    Args:
        folder: the deployment.
        options: further ones.
        log: takes what it says on stderr.
    """

    def __init__(self, folder: Path, options: Sequence[str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "loracle.cli", "serve", str(folder), "--port", "0", *options]
        with log.open("w") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("http://"):
            raise SystemExit(f"the server does not start: {log.read_text()[-500:]}")
        self.address = line.split()[0]
        self.samples: list[Memory] = []
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self._ended.set()
        self._sampler.join()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_END_SECONDS)
        finally:
            self._process.kill()

    def faults(self) -> list[str]:
        """Lines of the log that tell of a fault of the server."""
        return [
            line for line in self._log.read_text().splitlines() if "Traceback" in line or "failed" in line
        ]

    def _sample(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(1.0):
            try:
                found = mapped_bytes(("Rss", "Anonymous", "Pss"), self._process.pid)
            except OSError:
                return  # it has ended
            self.samples.append(Memory(time.monotonic() - began, *found))


def trend(samples: Sequence[tuple[float, int]]) -> Trend:
    """The trend of samples of seconds and bytes, at least two."""
    seconds, sizes = (np.array(column, np.float64) for column in zip(*samples, strict=True))
    slope = float(np.polyfit(seconds, sizes, 1)[0])
    quarter = max(len(sizes) // 4, 1)
    start, end = (int(np.median(part)) for part in (sizes[:quarter], sizes[-quarter:]))
    return Trend(start, end, 60 * slope, slope * float(seconds[-1] - seconds[0]) / start)
