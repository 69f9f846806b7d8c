"""How fast this machine's threads read memory."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_REPEATS = 10


def read_bandwidth(threads: int, nbytes: int = 2**30) -> float:
    """Bytes per second at which `threads` threads read one array, each its part; the best of a few times.

    NumPy lets go of the interpreter while it finds a maximum, and its kernel waits for memory alone.
    """
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return nbytes / best
