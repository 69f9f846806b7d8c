"""Merging one weight: loracle against PEFT's `merge_adapter` and loralib's merge, in time and in correctness.

All in one process with equal threads. Every round runs each way once, in an order that rotates, from the same
weight; a ratio is the median over the rounds of (this way's seconds / PEFT's in the same round). Before
anything is timed, the results are compared: each way's must lie inside its a-priori bound, and every entry is
checked for correct rounding against an evaluation in extended precision, and against rational arithmetic
wherever the two differ.

Floors beside the times: one pass over the bytes (the weight read, the result written), measured as a copy
with the same threads, and the multiplications.

    python -m benchmarks.merge [--rounds 21] [--threads 2] [--out benchmarks/results/merge.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from loracle.reference import LowRank, Precision, merge, merge_bound, merge_exact, round_float64
from loracle.reference.rounding import round_sum_to_odd
from loracle.torch_impl.arrays import array_of, tensor_of

from .machine import describe

SHAPES = ((4096, 4096), (11008, 4096))
RANKS = (8, 64)
DTYPES = (torch.float32, torch.bfloat16)
ALPHA_OVER_R = 2.0
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """W0 (out, in) and float32 factors, of the sizes that training leaves: W0 0.02, the update a tenth of
    it.
    """

    W0: Tensor
    A: Tensor
    B: Tensor

    @staticmethod
    def random(shape: tuple[int, int], r: int, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(shape[0] + r)
        W0 = torch.randn(shape, generator=generator) * 0.02
        A = torch.randn(r, shape[1], generator=generator) / shape[1] ** 0.5
        B = torch.randn(shape[0], r, generator=generator) * 0.02 * (8 / r) ** 0.5
        return Problem(W0.to(dtype), A, B)


@dataclass(frozen=True)
class Way:
    """One way to merge: ``prepare`` puts the frozen weight in place, ``run`` is timed, ``result`` is read
    after.
    """

    prepare: Callable[[], object]
    run: Callable[[], object]
    result: Callable[[], Tensor]


def peft_way(problem: Problem) -> Way:
    """PEFT's layer on an nn.Linear; `merge_adapter` adds the update in place."""
    out_features, in_features = problem.W0.shape
    linear = nn.Linear(
        in_features, out_features, bias=False, dtype=problem.W0.dtype, device=problem.W0.device
    )
    config = peft.LoraConfig(
        r=len(problem.A), lora_alpha=round(ALPHA_OVER_R * len(problem.A)), target_modules=["0"]
    )
    model = peft.get_peft_model(nn.Sequential(linear), config)
    layer: Any = model.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(problem.A)
    layer.lora_B["default"].weight.data.copy_(problem.B)

    def prepare() -> None:
        layer.merged_adapters.clear()
        layer.base_layer.weight.data.copy_(problem.W0)

    return Way(prepare, model.merge_adapter, lambda: layer.base_layer.weight.data)


def loralib_way(problem: Problem) -> Way:
    """loralib's layer, with factors in float32; it adds the update in place in `eval`."""
    out_features, in_features = problem.W0.shape
    r = len(problem.A)
    layer = loralib.Linear(in_features, out_features, r=r, lora_alpha=round(ALPHA_OVER_R * r), bias=False)
    layer.weight.data = problem.W0.clone()
    layer.lora_A.data.copy_(problem.A)
    layer.lora_B.data.copy_(problem.B)

    def prepare() -> None:
        layer.merged = False
        layer.training = True
        layer.weight.data.copy_(problem.W0)

    return Way(prepare, layer.eval, lambda: layer.weight.data)


def our_way(problem: Problem, threads: int, into_buffer: bool) -> Way:
    """`merge` into a new array, or into one that is there already; W0 stays as it is."""
    W0, A, B = (array_of(tensor) for tensor in (problem.W0, problem.A, problem.B))
    buffer = np.zeros_like(W0) if into_buffer else None
    results: list[Array] = []

    def run() -> None:
        results.append(merge(W0, A, B, ALPHA_OVER_R, out=buffer, threads=threads))

    return Way(results.clear, run, lambda: tensor_of(results[-1]))


def extended(problem: Problem) -> Array:
    """The merge in extended precision, rounded once: right but beside a midpoint, where it errs by 2^-60."""
    W0, A, B = (array_of(tensor) for tensor in (problem.W0, problem.A, problem.B))
    result, A_wide = np.empty_like(W0), A.astype(np.longdouble)
    for start in range(0, len(W0), 64):
        rows = slice(start, start + 64)
        update = np.longdouble(ALPHA_OVER_R) * (B[rows].astype(np.longdouble) @ A_wide)
        value = W0[rows].astype(np.longdouble) + update
        high = value.astype(np.float64)
        result[rows] = round_float64(round_sum_to_odd(high, (value - high).astype(np.float64)), W0.dtype)
    return result


def truth(problem: Problem, ours: Array) -> Array:
    """Return the correctly rounded merge: extended precision and, where we differ, rational arithmetic."""
    W0, A, B = (array_of(tensor) for tensor in (problem.W0, problem.A, problem.B))
    result = extended(problem)
    for i, j in np.argwhere(result != ours):
        row, column = slice(i, i + 1), slice(j, j + 1)
        result[row, column] = merge_exact(W0[row, column], A[:, column], B[row], ALPHA_OVER_R, W0.dtype)
    return result


def check_inside_bound(problem: Problem, name: str, result: Array, exact: Array) -> None:
    """Stop where a way computes something else than a merge: its rounding may differ, its values may not."""
    W0, A, B = (array_of(tensor) for tensor in (problem.W0, problem.A, problem.B))
    rows = slice(0, 64)
    adapters = [LowRank(A, B[rows], ALPHA_OVER_R)]
    bound = merge_bound(W0[rows], adapters, Precision(np.float32), dtype=W0.dtype)
    off = np.abs(result[rows].astype(np.float64) - exact[rows].astype(np.float64))
    half_ulp = np.abs(exact[rows].astype(np.float64)) * (2.0**-8 if W0.dtype.itemsize == 2 else 2.0**-24)
    if not (off <= bound + half_ulp).all():
        raise SystemExit(f"{name} does not merge this weight: off by up to {off.max()}")


def copy_seconds(problem: Problem, repeats: int = 9) -> float:
    """Seconds to read the weight and write a result, with torch's threads: the floor of bytes."""
    out, times = torch.zeros_like(problem.W0), []
    for _ in range(repeats):
        start = time.perf_counter()
        out.copy_(problem.W0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed(way: Way) -> float:
    way.prepare()
    start = time.perf_counter()
    way.run()
    return time.perf_counter() - start


def measure(shape: tuple[int, int], r: int, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    """Compare the ways on one problem; the row of the result file."""
    problem = Problem.random(shape, r, dtype)
    ways = {
        "PEFT": peft_way(problem),
        "loralib": loralib_way(problem),
        "loracle": our_way(problem, threads, into_buffer=False),
        "loracle, out=": our_way(problem, threads, into_buffer=True),
    }
    for way in ways.values():
        timed(way)
    exact = truth(problem, array_of(ways["loracle"].result()))
    wrong = {}
    for name, way in ways.items():
        result = array_of(way.result())
        check_inside_bound(problem, name, result, exact)
        wrong[name] = float(np.mean(result != exact))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        names = list(ways)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            seconds[name].append(timed(ways[name]))
    ratios = {
        name: [own / peft for own, peft in zip(seconds[name], seconds["PEFT"], strict=True)] for name in ways
    }
    return {
        "shape": list(shape),
        "r": r,
        "dtype": str(dtype).removeprefix("torch."),
        "floor_bytes": 2 * problem.W0.numel() * problem.W0.element_size(),
        "floor_copy_seconds": copy_seconds(problem),
        "multiply_adds": shape[0] * shape[1] * r,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio_to_peft": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
        "incorrectly_rounded": wrong,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a person reads them."""
    result = Table(
        "weight",
        "r",
        "dtype",
        "way",
        "ms",
        "ratio to PEFT",
        "wrongly rounded",
        "copy alone, ms",
        title="merge",
    )
    for row in rows:
        for name, seconds in row["seconds"].items():
            first = name == "PEFT"
            low, high = row["ratio_quartiles"][name]
            result.add_row(
                "x".join(map(str, row["shape"])) if first else "",
                str(row["r"]) if first else "",
                row["dtype"] if first else "",
                name,
                f"{1e3 * seconds:.1f}",
                "1" if first else f"{row['ratio_to_peft'][name]:.2f} [{low:.2f}, {high:.2f}]",
                f"{row['incorrectly_rounded'][name]:.4%}",
                f"{1e3 * row['floor_copy_seconds']:.1f}" if first else "",
                end_section=name == list(row["seconds"])[-1],
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(shape, r, dtype, arguments.threads, arguments.rounds)
        for shape in SHAPES
        for r in RANKS
        for dtype in DTYPES
    ]
    result = {
        "machine": describe("numpy", "ml_dtypes", "torch", "peft", "loralib"),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(rows))


if __name__ == "__main__":
    main()
