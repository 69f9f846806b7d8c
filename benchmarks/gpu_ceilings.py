"""What a device can do at most: measured, beside which results stand; and time on its own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

_REPEATS = 20
_COPIED_BYTES = 2**32
_PRODUCT_ROWS = 8192


@dataclass(frozen=True)
class Ceilings:
    """Measured on a device.

    Attributes:
        bytes_per_second: of copying memory within the device, bytes read and bytes written.
        flops_per_second: of a square product of random bfloat16 numbers, `_PRODUCT_ROWS` wide.
    """

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The floor of something that has to do as many operations and move as many bytes."""
        return max(flops / self.flops_per_second, nbytes / self.bytes_per_second)

    def bound(self, flops: float, nbytes: float) -> str:
        """Which of the two is the floor."""
        arithmetic = flops / self.flops_per_second >= nbytes / self.bytes_per_second
        return "arithmetic" if arithmetic else "memory"


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds that the device is busy with a call, between two events; on the CPU those that pass."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3


def median_seconds(run: Callable[[], object], device: str, repeats: int = _REPEATS) -> float:
    """The median of `seconds_of`, after two calls that do not count."""
    for _ in range(2):
        run()
    return statistics.median(seconds_of(run, device) for _ in range(repeats))


def measure_ceilings(
    device: str, *, copied_bytes: int = _COPIED_BYTES, rows: int = _PRODUCT_ROWS
) -> Ceilings:
    """Measure a device: one after the other, so that not both need their memory at once."""
    return Ceilings(
        2 * copied_bytes / _copying_seconds(device, copied_bytes),
        2 * rows**3 / _product_seconds(device, rows),
    )


def _copying_seconds(device: str, count: int) -> float:
    source = torch.randint(-128, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


def _product_seconds(device: str, rows: int) -> float:
    left, right = (torch.randn(rows, rows, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    return median_seconds(lambda: torch.mm(left, right, out=product), device)


def ceilings_of(device: str, *, quick: bool) -> Ceilings:
    """Measure a device; a quick run, of little."""
    return measure_ceilings(device, copied_bytes=2**20, rows=64) if quick else measure_ceilings(device)
