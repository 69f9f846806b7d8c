"""A training step with LoRA: loracle, PEFT, loralib and full fine-tuning over the floor of a frozen model.

A step is zero_grad, forward with the model's own loss (the labels are the input), backward, and AdamW (fused)
on what is trained; no key-value cache. The model has SmolLM2-135M's shape and seeded weights, or is
`--model`; the batch is 4 x 128 tokens.

The floor is the same model, frozen, without an adapter: forward with loss, and backward down to the output of
the token embedding, which is made to require a gradient. It leaves out the gradients of all parameters and
the optimizer's step, and does a little that LoRA need not: without a trained weight below it the first
layer's input requires no gradient, which spares an adapted model the input gradients of that layer's q, k and
v (0.2 % of the floor's operations). Beside each ratio stand the operations that the mathematics needs, over
the floor's: `train_step_flops`.

In bfloat16 the frozen weights and the activations are bfloat16, without autocast, and the adapters float32:
loracle casts them to the input's dtype, PEFT the input to theirs. loralib's have the weight's dtype, and full
fine-tuning has bfloat16 weights and moments. All ways use the attention that loracle's trainer would choose,
plain products in bfloat16 at this length, unless `--attention` names one.

First, parity: the ways must agree on loss and gradients (`train_step_parity`). Then memory: the peak of each
in a fresh process (`train_step_memory`). Then time: one process, the same threads, and for each dtype one
chain in which every way stands twice between two steps of the floor, F X X F Y Y F ..., backwards in every
second round. A way's ratio in a round is (X + X) / (F + F) with the floor's steps beside it; the figure is
the median over the rounds, with an interval from order statistics. The A/A control is a second floor in a
way's place; its interval is over both controls of a dtype. A ratio to PEFT is the quotient of two ratios of
one round. All ways of a chain are alive at once, their frozen weights shared.

    python -m benchmarks.train_step [--rounds 3] [--quick] [--all] [--model DIR]
        [--parts parity memory time] [--dtype float32 bfloat16] [--targets q+v all-linear] [--rank 8 64]
        [--dropout 0 0.05] [--attention eager|sdpa] [--threads 2] [--out benchmarks/results/train_step.json]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .machine import describe
from .train_step_flops import step_flops
from .train_step_memory import peaks
from .train_step_parity import parity
from .train_step_report import checks, checks_table, parity_table, rows_table, summary
from .train_step_subjects import (
    ADAPTED,
    CONTROL,
    DTYPES,
    FLOOR,
    FLOOR_CHUNKED,
    FULL,
    PEFT,
    TARGETS,
    Case,
    Subject,
    Workload,
    base_model,
    cases,
    shape_of,
    shared_copy,
    subject,
)

PARTS = ("parity", "memory", "time")
Way = tuple[str, Case | None]
"""A name of `train_step_subjects`, and the case of the ways that have one."""


def ways_of(chosen: Sequence[Case], *, controls: bool) -> tuple[Way, ...]:
    """What is compared with the floor, in order; with `controls`, an A/A control before each targets."""
    ways: list[Way] = []
    for at, case in enumerate(chosen):
        if controls and (at == 0 or chosen[at - 1].targets != case.targets):
            ways.append((CONTROL, None))
        ways += [(name, case) for name in ADAPTED]
    return (*ways, (FULL, None), (FLOOR_CHUNKED, None))


def chain(floor: Callable[[], float], ways: Sequence[Callable[[], float]]) -> Iterator[float]:
    """Call F X X F Y Y F ... and yield each way's (X + X) / (F + F), of the floor's calls beside it."""
    before = floor()
    for way in ways:
        own = way() + way()
        after = floor()
        yield own / (before + after)
        before = after


def timed(subject: Subject, tokens: torch.Tensor, seconds: list[float]) -> Callable[[], float]:
    """A call that takes a step, and keeps and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        subject.step(tokens)
        seconds.append(time.perf_counter() - start)
        return seconds[-1]

    return run


def measure(work: Workload, ways: Sequence[Way], rounds: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Time all ways in one chain; the floor's seconds, and each way's seconds and ratios."""
    base = base_model(work)
    tokens = work.tokens(base.config.vocab_size)
    floor = subject(FLOOR, shared_copy(base), None)
    subjects = [
        subject(name, copy.deepcopy(base) if name == FULL else shared_copy(base), case) for name, case in ways
    ]
    for warm in (floor, *subjects):
        if not torch.isfinite(warm.step(tokens)):
            raise SystemExit(f"{warm.name}: its loss is not finite")
    floor_seconds: list[float] = []
    results: list[dict[str, Any]] = [{"all_seconds": [], "ratios": []} for _ in ways]
    runs = [timed(own, tokens, result["all_seconds"]) for own, result in zip(subjects, results, strict=True)]
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            turn = slice(None, None, 1 if round_ % 2 == 0 else -1)
            ratios = chain(timed(floor, tokens, floor_seconds), runs[turn])
            for result, ratio in zip(results[turn], ratios, strict=True):
                result["ratios"].append(ratio)
    finally:
        gc.enable()
    return floor_seconds, results


def flops(model: Any, work: Workload, way: Way) -> int:
    """Operations of one step; see `step_flops`."""
    name, case = way
    if case is not None:
        return step_flops(model, work.batch, work.length, adapted=TARGETS[case.targets], r=case.r)
    return step_flops(model, work.batch, work.length, input_grad=True, full=name == FULL)


def rows_of(
    work: Workload, ways: Sequence[Way], rounds: int, threads: int, parts: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one dtype, one for each way and the floor first; what was not measured is None."""
    shape = shape_of(work)
    operations = [flops(shape, work, way) for way in ((FLOOR, None), *ways)]
    rows: list[dict[str, Any]] = [
        {
            "dtype": work.dtype,
            "way": name,
            **(dict.fromkeys(("targets", "r", "dropout")) if case is None else asdict(case)),
            "gflop": count / 1e9,
            "flop_ratio": count / operations[0],
            **summary(None, None),
            "peak_bytes": None,
            "peak_above_model_bytes": None,
        }
        for (name, case), count in zip(((FLOOR, None), *ways), operations, strict=True)
    ]
    if "memory" in parts:
        wanted = [(FLOOR, None), *(way for way in ways if way[0] != CONTROL)]
        built, largest = peaks(work, wanted, threads)
        for row, way in zip(rows, ((FLOOR, None), *ways), strict=True):
            if way in largest:
                row["peak_bytes"] = largest[way]
                row["peak_above_model_bytes"] = largest[way] - built
    if "time" in parts:
        floor_seconds, results = measure(work, ways, rounds)
        peft = {
            case: result["ratios"] for (name, case), result in zip(ways, results, strict=True) if name == PEFT
        }
        rows[0].update(summary({"all_seconds": floor_seconds, "ratios": None}, None))
        for row, (_, case), result in zip(rows[1:], ways, results, strict=True):
            row.update(summary(result, peft.get(case)))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model: does it run? Writes no file unless --out"
    )
    parser.add_argument(
        "--all", action="store_true", help="also other ranks with dropout, not one change at a time"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--rank", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--attention", choices=("eager", "sdpa"))
    parser.add_argument("--model", help="a folder of transformers, of Llama's architecture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.out is None and not arguments.quick:
        arguments.out = Path("benchmarks/results/train_step.json")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    say = Console(stderr=True).print
    chosen = cases(arguments.targets, arguments.rank, arguments.dropout, every=arguments.all)
    size: dict[str, Any] = (
        {"layers": 2, "vocabulary": 512, "batch": 2, "length": 16} if arguments.quick else {}
    )
    result: dict[str, Any] = {
        "machine": describe("torch", "transformers", "peft", "loralib"),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "workloads": [],
        "parity": [],
        "rows": [],
    }
    for dtype in arguments.dtype:
        work = Workload(dtype, arguments.model, arguments.attention, **size)
        result["workloads"].append(asdict(work))
        if "parity" in arguments.parts:
            say(f"{dtype}: parity")
            for case in dict.fromkeys(Case(case.targets, case.r, 0.0) for case in chosen):
                errors = parity(work, case)
                result["parity"] += [
                    {"dtype": dtype, "targets": case.targets, "r": case.r, "way": name, **own}
                    for name, own in errors.items()
                ]
        say(f"{dtype}: memory and time")
        ways = ways_of(chosen, controls=True)
        result["rows"] += rows_of(work, ways, arguments.rounds, arguments.threads, arguments.parts)
    result["checks"] = checks(result["rows"])
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    # As wide as the tables are, also where the output is no terminal.
    screen = Console(width=160)
    for table in (parity_table(result["parity"]), rows_table(result["rows"]), checks_table(result["checks"])):
        screen.print(table)


if __name__ == "__main__":
    main()
