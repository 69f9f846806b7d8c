"""Decode speed of the base model, of the same model with an adapter merged, and with it left in the graph.

Interleaved in one process, same threads; the merged graph is node for node the base's, so the expected ratio
is 1. A floor beside it: every weight is read once a token.

    python -m benchmarks.decode [--rounds 20] [--tokens 48] [--out benchmarks/results/decode.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from loracle.demo.smollm2 import model_folder
from loracle.demo.speed import measure_decode
from loracle.export import DecoderSession, export
from loracle.export.outputs_check import generate_with_logits
from loracle.export.unmerged import export_unmerged

from .adapters import random_adapter
from .machine import describe

PROMPT = tuple(range(1000, 1032))


def read_bandwidth(nbytes: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second of one thread summing a large array: a floor's denominator, not a record."""
    data = np.ones(nbytes // 4, np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    arguments = parser.parse_args()
    base = model_folder()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        adapter = random_adapter(base, work / "adapter")
        export(base, work / "base")
        summary = export(base, work / "merged", adapter)
        export_unmerged(base, adapter, work / "unmerged")
        runs = {
            name: generate_with_logits(DecoderSession(work / name, 64), PROMPT, 24)
            for name in ("merged", "unmerged")
        }
        if runs["merged"].ids != runs["unmerged"].ids:
            raise SystemExit("merged and unmerged answer differently, so there is nothing to compare")
        tokens = runs["merged"].ids[len(PROMPT) :][:24]
        tokens = tuple(tokens * (arguments.tokens // len(tokens) + 1))[: arguments.tokens]
        folders = {name: work / name for name in ("base", "merged", "unmerged")}
        speeds = measure_decode(folders, PROMPT, tokens, rounds=arguments.rounds, threads=arguments.threads)
    result = {
        "machine": describe("onnxruntime"),
        "model": "SmolLM2-135M-Instruct, float32, all linear layers adapted, r=8",
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "bytes_read_per_token": summary.bytes,
        "one_thread_bandwidth": read_bandwidth(),
        "speeds": {name: dataclasses.asdict(speed) for name, speed in speeds.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(
        "graph", "tokens/s", "ratio to base", "95% interval", title="decode, 135M, fp32, interleaved"
    )
    for name, speed in speeds.items():
        table.add_row(
            name,
            f"{speed.tokens_per_second:.1f}",
            f"{speed.ratio:.3f}",
            f"{speed.low:.3f} to {speed.high:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
