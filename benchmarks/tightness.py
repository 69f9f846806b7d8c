"""How tight the error bounds are in practice: the error of real kernels over the bound, entry by entry.

Seeded gaussian problems, evaluated by torch's kernels in the dtype (TF32 by rounding the factors of every
product to 11 bits); the exact value is the reference in float64, in extended precision for float64 itself.
Printed: the median and the largest ratio of error to bound, over all entries and problems. A ratio above 1
would be a bound that does not hold.

    python -m benchmarks.tightness [--problems 20] [--out benchmarks/results/tightness.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loracle.reference import (
    LowRank,
    Precision,
    linear_backward_bound,
    linear_forward_bound,
    merge,
    merge_bound,
    merged_against_unmerged_bound,
    merged_forward_bound,
)
from loracle.torch_impl.arrays import array_of, tensor_of

from .machine import describe
from .tightness_layers import layers

Array = np.ndarray[Any, Any]
Pair = tuple[str, Array, Array]
SCALING = 0.5
PRECISIONS: dict[str, tuple[torch.dtype, Precision]] = {
    "float64": (torch.float64, Precision(np.float64)),
    "float32": (torch.float32, Precision(np.float32)),
    "TF32": (torch.float32, Precision(np.float32, multiplicands="tf32")),
    "bfloat16": (torch.bfloat16, Precision("bfloat16", accumulator=np.float32)),
    "float16": (torch.float16, Precision(np.float16, accumulator=np.float32)),
}
# Batch, in, out, r; the second is where the probabilistic form is of use.
SHAPES = {"small": (16, 64, 48, 8), "large": (8, 4096, 256, 64)}
FAILURE = 1e-6


@dataclass(frozen=True)
class Problem:
    """x (batch, in), dy (batch, out), W0 (out, in), A (r, in), B (out, r), of size one, rounded to the
    dtype.
    """

    x: Tensor
    dy: Tensor
    W0: Tensor
    A: Tensor
    B: Tensor

    @staticmethod
    def random(seed: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Problem:
        batch, n_in, n_out, r = shape
        generator = torch.Generator().manual_seed(seed)
        shapes = [(batch, n_in), (batch, n_out), (n_out, n_in), (r, n_in), (n_out, r)]
        return Problem(
            *(torch.randn(own, generator=generator, dtype=torch.float64).to(dtype) for own in shapes)
        )

    def arrays(self) -> list[Array]:
        return [array_of(tensor) for tensor in (self.x, self.dy, self.W0, self.A, self.B)]


def tf32(values: Tensor) -> Tensor:
    """Round float32 to 11 significant bits, ties to even."""
    bits = values.contiguous().view(torch.int32)
    even = ((bits >> 13) & 1) + ((1 << 12) - 1)
    return ((bits + even) & ~((1 << 13) - 1)).view(torch.float32)


def evaluate(p: Problem, product: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Forward and backward in PEFT's order of operations."""
    h = product(p.x, p.A.T)
    dh = product(p.dy, p.B) * SCALING
    return {
        "forward": product(p.x, p.W0.T) + product(h, p.B.T) * SCALING,
        "dx": product(p.dy, p.W0) + product(dh, p.A),
        "dA": product(dh.T, p.x),
        "dB": product(p.dy.T, h) * SCALING,
    }


def exactly(p: Problem) -> dict[str, Array]:
    """The same in extended precision, which is exact beside every dtype here."""
    x, dy, W0, A, B = (array.astype(np.float64).astype(np.longdouble) for array in p.arrays())
    h, dh = x @ A.T, (dy @ B) * SCALING
    return {
        "forward": x @ W0.T + (h @ B.T) * SCALING,
        "dx": dy @ W0 + dh @ A,
        "dA": dh.T @ x,
        "dB": (dy.T @ h) * SCALING,
        "weight": W0 + (B @ A) * SCALING,
    }


def compared(p: Problem, name: str, precision: Precision) -> Iterator[Pair]:
    """Yield what was computed, its error and its bound, for every bound there is."""
    product = torch.matmul if name != "TF32" else lambda a, b: tf32(a) @ tf32(b)
    exact, computed = exactly(p), evaluate(p, product)
    x, dy, W0, A, B = p.arrays()
    adapters = [LowRank(A, B, SCALING)]
    gradients = linear_backward_bound(dy, x, W0, A, B, SCALING, precision)
    bounds = {"forward": linear_forward_bound(x, W0, A, B, SCALING, precision)}
    bounds |= {own: getattr(gradients, own) for own in ("dx", "dA", "dB")}
    for what, bound in bounds.items():
        yield what, off(computed[what], exact[what]), bound
    if precision.failure is None and name != "TF32":
        merged = p.W0 + product(p.B, p.A) * SCALING
        yield "merge, rounded each time", off(merged, exact["weight"]), merge_bound(W0, adapters, precision)
    W = merge(W0, A, B, SCALING)
    y = product(p.x, tensor_of(W).T)
    truth = x.astype(np.float64).astype(np.longdouble) @ W.astype(np.float64).astype(np.longdouble).T
    yield "merged forward", off(y, truth), merged_forward_bound(x, W, precision)
    difference = np.abs(y.double().numpy() - computed["forward"].double().numpy())
    yield "merged - unmerged", difference, merged_against_unmerged_bound(x, W0, adapters, precision)


def off(computed: Tensor, exact: Array) -> Array:
    error: Array = np.abs(computed.double().numpy() - exact).astype(np.float64)
    return error


def rows(problems: int) -> list[dict[str, Any]]:
    found = []
    for shape_name, shape in SHAPES.items():
        for failure in (None, FAILURE) if shape_name == "large" else (None,):
            for name, (dtype, plain) in PRECISIONS.items():
                precision = Precision(plain.dtype, plain.accumulator, plain.multiplicands, failure)
                ratios: dict[str, list[Array]] = {}
                for seed in range(problems if shape_name == "small" else max(1, problems // 10)):
                    for what, error, bound in compared(Problem.random(seed, shape, dtype), name, precision):
                        ratios.setdefault(what, []).append((error / bound).ravel())
                for what, values in ratios.items():
                    together = np.concatenate(values)
                    found.append(
                        {
                            "shape": list(shape),
                            "failure": failure,
                            "precision": name,
                            "bound": what,
                            "entries": together.size,
                            "median": float(np.median(together)),
                            "largest": float(together.max()),
                        }
                    )
    return found


def layer_rows(problems: int) -> list[dict[str, Any]]:
    """The same for every other kind of layer, in float32."""
    ratios: dict[str, list[Array]] = {}
    for seed in range(problems):
        for kind, computed, exact, bound in layers(seed):
            ratios.setdefault(kind, []).append((np.abs(computed.astype(np.float64) - exact) / bound).ravel())
    return [
        {
            "bound": kind,
            "precision": "float32",
            "entries": sum(values.size for values in parts),
            "median": float(np.median(np.concatenate(parts))),
            "largest": float(np.concatenate(parts).max()),
        }
        for kind, parts in ratios.items()
    ]


def pivot(found: list[dict[str, Any]]) -> Table:
    """One line for a bound, one column for a precision: median and largest ratio."""
    table = Table(
        "batch, in, out, r",
        "form",
        "bound",
        *PRECISIONS,
        title="error / bound: median, largest",
        box=MARKDOWN,
    )
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in found:
        form = "certain" if row["failure"] is None else f"but for {row['failure']:g}"
        key = (", ".join(map(str, row["shape"])), form, row["bound"])
        lines.setdefault(key, {})[row["precision"]] = f"{row['median']:.1g}, {row['largest']:.1g}"
    for key, cells in lines.items():
        table.add_row(*key, *(cells.get(name, "") for name in PRECISIONS))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tightness.json"))
    arguments = parser.parse_args()
    found = rows(arguments.problems)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    kinds = layer_rows(arguments.problems)
    result = {"machine": describe("numpy", "torch"), "rows": found, "layers": kinds}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=150).print(pivot(found))
    table = Table("layer", "float32", title="error / bound: median, largest", box=MARKDOWN)
    for row in kinds:
        table.add_row(row["bound"], f"{row['median']:.1g}, {row['largest']:.1g}")
    Console(width=150).print(table)
    broken = [row for row in found + kinds if row["largest"] > 1]
    if broken:
        raise SystemExit(f"{len(broken)} bounds do not hold, first {broken[0]}")


if __name__ == "__main__":
    main()
