"""`loracle verify` of every weight of a merged model, beside the time that reading the files takes.

An adapter of all linear layers (r=8, seeded) is merged into SmolLM2-135M in float32, or into random weights
of the shape of TinyLlama-1.1B or of Llama-2-7B in bfloat16, written here into a temporary folder. Candidates:

- ONNX: `loracle export` (float32, or float16 for 7b)
- checkpoint: `loracle merge`
- PEFT's checkpoint: PEFT's merge, saved; every merged weight is rounded otherwise and has to be explained
- floor: reading the base's and the candidate's tensor files to their ends, in one thread

Outputs are not compared (`--no-outputs`): a 7B model in float64 has 54 GB. Each run is a fresh process; the
floor, verify, and verify with a certificate, for which all files are digested, run in turn, backwards in
every second round. Each begins with the files out of the page cache: a large model does not fit there, and
what is left of it by chance would decide how long reading takes. The peak is of one run more: the largest sum
of the resident sets of verify and of the processes that it starts, with the mapped pages of files, a page of
several processes once for each. Every run must pass.

    python -m benchmarks.verify [--models 135m 1.1b 7b] [--candidates ...] [--rounds 3] [--scratch DIR]
        [--out benchmarks/results/verify.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loracle.export.options import DTYPES

from .adapters import random_adapter
from .export_models import LARGE, MIDDLE, MODELS, SMOL, TINY, Model
from .machine import describe
from .peers import peft_merge
from .process import Measured, measure, peak_of_all

ONNX, CHECKPOINT, PEFT = "ONNX", "checkpoint", "PEFT's checkpoint"
FLOOR, VERIFY, CERTIFIED = "reading the files", "verify", "verify --certificate"


def _loracle(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "loracle.cli", *map(str, arguments)]


def make_candidate(kind: str, model: Model, base: Path, adapter: Path, out: Path) -> None:
    """Merge the adapter into the base in one of the ways."""
    commands: dict[str, Callable[[], list[str]]] = {
        ONNX: lambda: _loracle(
            "export", "--model", base, "--adapter", adapter, "--dtype", model.precision, "--out", out
        ),
        CHECKPOINT: lambda: _loracle("merge", "--model", base, "--adapter", adapter, "--out", out),
        PEFT: lambda: peft_merge(sys.executable, base, adapter, out, model.stored),
    }
    measure(commands[kind]())


def verify_command(base: Path, adapter: Path, candidate: Path, certificate: Path | None) -> list[str]:
    """The command, which ends with 0 where the candidate passes; with a certificate it digests all files."""
    written: list[str | Path] = [] if certificate is None else ["--certificate", certificate]
    return _loracle("verify", candidate, "--model", base, "--adapter", adapter, "--no-outputs", *written)


def evict(*folders: Path) -> None:
    """Have the system forget what it keeps in memory of the folders' files."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not yet on the disk stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def rows_of_model(model: Model, kinds: Sequence[str], rounds: int, work: Path) -> list[dict[str, Any]]:
    """Measure verify on each candidate of a model."""
    base = model.make(work / "base")
    adapter = random_adapter(base, work / "adapter")
    rows = []
    for kind in kinds:
        candidate = work / "candidate"
        make_candidate(kind, model, base, adapter, candidate)
        certificate = work / "certificate.json"
        commands = {
            FLOOR: [sys.executable, "-S", "-m", "benchmarks.verify_floor", str(base), str(candidate)],
            VERIFY: verify_command(base, adapter, candidate, None),
            CERTIFIED: verify_command(base, adapter, candidate, certificate),
        }
        runs: dict[str, list[Measured]] = {name: [] for name in commands}
        for round_ in range(rounds):
            for name in list(commands)[:: 1 if round_ % 2 == 0 else -1]:
                evict(base, candidate)
                runs[name].append(measure(commands[name]))
                certificate.unlink(missing_ok=True)
        nbytes = sum(path.stat().st_size for folder in (base, candidate) for path in folder.rglob("*"))
        seconds = {name: [run.seconds for run in own] for name, own in runs.items()}
        ratios = {
            name: [ours / floor for ours, floor in zip(own, seconds[FLOOR], strict=True)]
            for name, own in seconds.items()
        }
        rows.append(
            {
                "model": model.name,
                "candidate": kind,
                "bytes": nbytes,
                "floor_seconds": statistics.median(seconds[FLOOR]),
                "seconds": statistics.median(seconds[VERIFY]),
                "over_floor": statistics.median(ratios[VERIFY]),
                "over_floor_all": ratios[VERIFY],
                "certified_over_floor": statistics.median(ratios[CERTIFIED]),
                "peak_bytes": peak_of_all(commands[VERIFY]),
            }
        )
        shutil.rmtree(candidate)
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a person."""
    table = Table(
        "model", "candidate", "GB read", "reading, s", "verify, s", "over reading", "with digests", "peak, MB"
    )
    for row in rows:
        spread = row["over_floor_all"]
        table.add_row(
            row["model"],
            row["candidate"],
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['floor_seconds']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['over_floor']:.2f} [{min(spread):.2f}, {max(spread):.2f}]",
            f"{row['certified_over_floor']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=(TINY, SMOL, MIDDLE, LARGE), default=[SMOL, LARGE])
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=(ONNX, CHECKPOINT, PEFT),
        help="default: all, but PEFT's of 7b, whose merge takes more than 24 GB",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder for models; 7b needs 30 GB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/verify.json"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        say(MODELS[name].described)
        kinds = arguments.candidates or ([ONNX, CHECKPOINT] if name == LARGE else [ONNX, CHECKPOINT, PEFT])
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            rows += rows_of_model(MODELS[name], kinds, arguments.rounds, Path(scratch))
    result = {
        "machine": describe("torch", "transformers", "peft", "onnxruntime", "onnx-ir"),
        "models": {name: MODELS[name].described for name in arguments.models},
        "rounds": arguments.rounds,
        "dtypes": {name: str(DTYPES[MODELS[name].precision]) for name in arguments.models},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=140).print(table_of(rows))


if __name__ == "__main__":
    main()
