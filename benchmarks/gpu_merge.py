"""Merging a whole model on a GPU: correctly rounded, over the time that its memory takes.

All linear layers of a Llama shape of 7B, bfloat16, each with an adapter of rank 16, float32, of random
numbers whose update is a few percent of the weight. Every weight is merged into new memory, as
`loracle.torch_impl.merge` does; all merges are started before the first is waited for. Beside it PEFT's
`merge_adapter`, which overwrites the weights, and the bytes that have to be moved, each weight read once and
written once, over the rate at which the device copies memory. A way's figure is the median of passes over all
weights.

Then every merged entry is held against `loracle.reference.merge` on the host, bit for bit, and PEFT's
are counted.

    python -m benchmarks.gpu_merge [--quick] [--device cuda] [--dtype bfloat16] [--rounds 5]
        [--out benchmarks/results/gpu-merge.json]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from loracle.reference import merge
from loracle.torch_impl.arrays import array_of
from loracle.torch_impl.device_factors import DeviceLowRank
from loracle.torch_impl.device_merge import DeviceMerge

from .gpu_ceilings import ceilings_of, seconds_of
from .gpu_machine import describe_device, require_cuda, write_result
from .gpu_options import parsed, parser_of
from .merge import ALPHA_OVER_R, Problem, peft_way
from .tables import plain_table
from .train_step_subjects import DTYPES, SIZES, Size

RANK = 16
OURS, PEFT = "loracle", "PEFT"


def shapes(size: Size) -> list[tuple[int, int]]:
    """The shapes of a model's linear layers, (out, in), the head's not among them."""
    keys = size.hidden // size.heads * size.kv_heads
    layer = [(size.hidden, size.hidden), (keys, size.hidden), (keys, size.hidden), (size.hidden, size.hidden)]
    layer += [(size.inner, size.hidden), (size.inner, size.hidden), (size.hidden, size.inner)]
    return layer * size.layers


def weights(size: Size, dtype: torch.dtype, device: str) -> list[Problem]:
    """Seeded weights with their adapters, on the device."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for out_features, in_features in shapes(size):
        W0, A, B = (
            torch.randn(shape, generator=generator, device=device).mul_(spread)
            for shape, spread in (
                ((out_features, in_features), 0.02),
                ((RANK, in_features), in_features**-0.5),
                ((out_features, RANK), 0.01),
            )
        )
        found.append(Problem(W0.to(dtype), A, B))
    return found


def merge_all(found: Sequence[Problem]) -> list[Tensor]:
    """All weights merged, correctly rounded, into new tensors."""
    started = [DeviceMerge(own.W0, [DeviceLowRank(own.A, own.B, ALPHA_OVER_R)]) for own in found]
    return [one.result() for one in started]


def wrongly_rounded(found: Sequence[Problem], merged: Sequence[Tensor]) -> int:
    """How many entries are not the reference's."""
    wrong = 0
    for own, result in zip(found, merged, strict=True):
        expected = merge(array_of(own.W0), array_of(own.A), array_of(own.B), ALPHA_OVER_R)
        bits = f"u{expected.itemsize}"
        wrong += int(np.count_nonzero(expected.view(bits) != array_of(result).view(bits)))
    return wrong


def passes(run: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Seconds of passes over all weights, after one that does not count."""
    run()
    return [seconds_of(run, device) for _ in range(rounds)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, quick="one small layer: does it run?", rounds=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    return parsed(parser, argv, "gpu-merge.json")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    require_cuda(arguments.device)
    size, device = SIZES["7b"], arguments.device
    if arguments.quick:
        size = Size(64, 176, 1, 2, 1, 32, 1e4)
    ceilings = ceilings_of(device, quick=arguments.quick)
    found = weights(size, DTYPES[arguments.dtype], device)
    entries = sum(own.W0.numel() for own in found)
    nbytes = 2 * entries * found[0].W0.itemsize
    floor = ceilings.seconds(2 * RANK * entries, nbytes)
    ours = passes(lambda: merge_all(found), device, arguments.rounds)
    wrong = wrongly_rounded(found, merge_all(found))
    peer = [peft_way(own) for own in found]
    peers = []
    for _ in range(arguments.rounds + 1):
        for one in peer:
            one.prepare()
        peers.append(seconds_of(lambda: [one.run() for one in peer], device))
    result: dict[str, Any] = {
        "machine": describe_device(device),
        "ceilings": asdict(ceilings),
        "dtype": arguments.dtype,
        "rank": RANK,
        "weights": len(found),
        "entries": entries,
        "moved_bytes": nbytes,
        "floor_seconds": floor,
        "rows": [
            row(OURS, ours, nbytes, ceilings.bytes_per_second, wrong, entries),
            row(
                PEFT,
                peers[1:],
                nbytes,
                ceilings.bytes_per_second,
                wrongly_rounded(found, [one.result() for one in peer]),
                entries,
            ),
        ],
    }
    write_result(arguments.out, result)
    show(result)
    if wrong:
        raise SystemExit(f"expected every entry to be rounded correctly, got {wrong} that are not")


def row(
    way: str, seconds: list[float], nbytes: int, bandwidth: float, wrong: int, entries: int
) -> dict[str, Any]:
    """A way's figures; the share of the bandwidth is that of the bytes which have to be moved."""
    median = statistics.median(seconds)
    return {
        "way": way,
        "seconds": median,
        "all_seconds": seconds,
        "bandwidth_share": nbytes / median / bandwidth,
        "wrongly_rounded": wrong,
        "wrong_share": wrong / entries,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for a person."""
    title = (
        f"{result['weights']} weights, {result['entries'] / 1e9:.2f}e9 entries, {result['dtype']}, "
        f"r = {result['rank']}; at least {1e3 * result['floor_seconds']:.2f} ms"
    )
    table = plain_table(title, ("way", "ms", "of the bandwidth", "wrongly rounded"))
    for one in result["rows"]:
        share = f"{one['wrongly_rounded']} ({one['wrong_share']:.2%})"
        table.add_row(one["way"], f"{1e3 * one['seconds']:.2f}", f"{one['bandwidth_share']:.3f}", share)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
