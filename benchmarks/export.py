"""From a base model and an adapter to ONNX: loracle against PEFT's merge with three exporters.

An adapter of all linear layers (r=8, seeded) is merged into SmolLM2-135M in float32, or into random weights
in bfloat16 of the shape of TinyLlama-1.1B (to float32) or of Llama-2-7B (to float16), written here shard by
shard into a temporary folder.

- loracle, graph cached: `loracle export` with a cache that holds the architecture's graph
- A/A control: the same once more in each round
- loracle, first export: with an empty cache
- PEFT + genai builder: PEFT's merge, saved, then onnxruntime-genai's builder
- PEFT + torch.onnx.export: PEFT's merge and torch's exporter (dynamo), with cache, in one process
- PEFT + Optimum: PEFT's merge, saved, then Optimum's exporter (benchmarks/peers.txt), with its validation
- disk floor: reading the base model's shards and writing as many bytes as loracle's export has, in one
  thread, without fsync (loracle's export ends with one)

Every step is a fresh process; the ways run in turn, backwards in every second round, each after a sync.
Seconds are medians over the rounds; a ratio is of one round, its interval from order statistics; the peak is
the largest resident set of any process of a way. Read and written are the bytes of read and write calls, from
/proc/PID/io at the process's end: loracle maps the checkpoint, and what it reads there is not among them.

Parity comes with the first round: the logits after a prompt must be the float64 model's within its tolerance
(numerics, clause 7); for the larger models every way must have the first way's most likely token. A model
that only loracle exports has nothing to be compared with.

    python -m benchmarks.export [--models 135m 1.1b 7b] [--ways ...] [--rounds 5] [--quick]
        [--optimum .venv-peers/bin/python] [--scratch DIR] [--out benchmarks/results/export.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loracle.export.options import DTYPES

from .adapters import random_adapter
from .export_models import LARGE, MIDDLE, MODELS, SMOL, TINY, Model
from .export_parity import Judge, float64_judge, last_logits
from .export_report import checks, checks_table, rows_of, rows_table
from .export_ways import CACHED, CONTROL, FIRST, FLOOR, OPTIMUM, WAYS, Job, Way
from .machine import describe
from .peers import PEERS_PYTHON, check_python
from .process import Measured

OURS = (CACHED, CONTROL, FIRST)


def ways_of(model: Model, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """What runs for a model: what is asked for, or the model's own ways and a control."""
    chosen = (CONTROL, *model.ways) if wanted is None else wanted
    return tuple(name for name in WAYS if name in chosen)


def measure(
    job: Job, names: Sequence[str], rounds: int, judge: Judge | None
) -> tuple[dict[str, list[Measured]], dict[str, float]]:
    """The runs of each way and of the floor, a number for each round; each way's error against the judge.

    Without a judge the first way is one for the others, where they are not loracle's alone.

    Raises SystemExit where an export that should have found its graph in the cache did not.
    """
    cached = job.way(CACHED)
    cached.run()  # fills the cache
    held = set(job.cache.rglob("*"))
    nbytes = sum(path.stat().st_size for path in cached.out.iterdir())
    cached.clear()
    ways: list[Way] = [job.floor(nbytes), *(job.way(name) for name in names)]
    judged = judge is not None or not set(names) <= set(OURS)
    runs: dict[str, list[Measured]] = {way.name: [] for way in ways}
    errors: dict[str, float] = {}
    for round_ in range(rounds):
        for way in ways[:: 1 if round_ % 2 == 0 else -1]:
            runs[way.name].append(way.run())
            if judged and round_ == 0 and way.name != FLOOR:
                logits = last_logits(way.out, job.base)
                judge = judge or Judge(logits, None)
                errors[way.name] = judge.error(way.name, logits)
            way.clear()
    if set(job.cache.rglob("*")) != held:
        raise SystemExit(
            f"{CACHED}: its graph was made anew during the rounds; leave loracle's sources alone meanwhile"
        )
    return runs, errors


def rows_of_model(
    model: Model, wanted: Sequence[str] | None, rounds: int, peers: Path, work: Path
) -> list[dict[str, Any]]:
    """Write the model into `work`, and measure what is wanted of it."""
    base = model.make(work / "base")
    adapter = random_adapter(base, work / "adapter")
    judge = float64_judge(base, adapter, DTYPES[model.precision]) if model.judged else None
    job = Job(base, adapter, work, model.precision, peers)
    runs, errors = measure(job, ways_of(model, wanted), rounds, judge)
    return rows_of(model.name, runs, errors, None if judge is None else judge.tolerance)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=(SMOL, MIDDLE, LARGE), default=[SMOL])
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, metavar="WAY", help="default: all that fit the model and 24 GB"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, one round: does it run? Writes no file unless --out",
    )
    parser.add_argument("--optimum", type=Path, default=PEERS_PYTHON, help="the Python that has Optimum")
    parser.add_argument("--scratch", type=Path, help="a folder for models; 7b needs 30 GB, 1.1b 16 GB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.rounds = [TINY], 1
    elif arguments.out is None:
        arguments.out = Path("benchmarks/results/export.json")
    if any(OPTIMUM in ways_of(MODELS[name], arguments.ways) for name in arguments.models):
        check_python(arguments.optimum)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        say(MODELS[name].described)
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            rows += rows_of_model(
                MODELS[name], arguments.ways, arguments.rounds, arguments.optimum, Path(scratch)
            )
    result = {
        "machine": describe(
            "torch", "transformers", "peft", "onnxruntime", "onnxruntime-genai", "onnx-ir", "onnxscript"
        ),
        "models": {name: MODELS[name].described for name in arguments.models},
        "rounds": arguments.rounds,
        "rows": rows,
        "checks": checks(rows),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    # As wide as the tables are, also where the output is no terminal.
    screen = Console(width=170)
    for table in (rows_table(rows), checks_table(result["checks"])):
        if table.row_count:
            screen.print(table)


if __name__ == "__main__":
    main()
