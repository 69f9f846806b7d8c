"""A training step on a GPU: loracle and PEFT, eager and compiled, and PEFT with Liger's kernels, over a
frozen model.

Models of three shapes with seeded bfloat16 weights, r = 16 on q and v or on all linear layers, texts of 512
and of 2048 tokens, as many at once as PEFT's step has memory for, a power of two. A step and the floor are
those of `benchmarks.train_step`: forward with loss and backward, and AdamW on what is trained; no step
recomputes activations. Ours is also compiled as `loracle finetune --torch-compile` does, and in torch's mode
that records CUDA graphs.

First parity: the ways must agree with float64 on loss and gradients (`train_step_parity`), on the device.
Then the peak memory of each way alone. Then time, by the device's own clock: one chain F X X F Y Y F ..., of
which every second goes backwards; the figure is the median of (X + X) / (F + F) with the floor's steps beside
it. The control is a second floor. Liger's ways come last and not in the chain, over the floor's median: its
kernels take the place of functions that every other model calls.

Utilisation is of the model's operations, 4 N per token: what the frozen weights' products need forward and
back, no adapter counted, over the rate of a large product measured on the device.

    python -m benchmarks.gpu_train_step [--quick] [--device cuda] [--size 135m 1.1b 7b] [--length 512 2048]
        [--targets q+v all-linear] [--rounds 10] [--out benchmarks/results/gpu-train-step.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from rich.console import Console

from .gpu_ceilings import Ceilings, ceilings_of, seconds_of
from .gpu_interleaved import in_turn
from .gpu_machine import describe_device, installed, require_cuda, write_result
from .gpu_options import parsed, parser_of
from .gpu_train_step_report import checks, checks_table, rows_table
from .intervals import median_interval
from .train_step import flops
from .train_step_parity import parity
from .train_step_subjects import (
    ADAPTED,
    CONTROL,
    FLOOR,
    FLOOR_CHUNKED,
    OURS,
    OURS_CHUNKED,
    OURS_COMPILED,
    OURS_GRAPHS,
    PEFT,
    PEFT_COMPILED,
    PEFT_LIGER,
    SIZES,
    TARGETS,
    Case,
    Subject,
    Workload,
    base_model,
    shape_of,
    shared_copy,
    subject,
)

RANK = 16
COMPILED = (PEFT_COMPILED, OURS_COMPILED, OURS_GRAPHS)
WAYS = (CONTROL, OURS, PEFT, PEFT_COMPILED, OURS_COMPILED, OURS_GRAPHS, OURS_CHUNKED, FLOOR_CHUNKED)
WARM_STEPS = 3
_MEMORY_SHARE = 0.9


def case_of(name: str, case: Case) -> Case | None:
    """The case of a way, None for those that adapt nothing."""
    return None if name in (CONTROL, FLOOR, FLOOR_CHUNKED) else case


def peak_bytes(work: Workload, base: Any, name: str, case: Case) -> int | None:
    """The most that a way has taken of the device's memory after two steps, alone; None on the CPU."""
    if torch.device(work.device).type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    own = subject(name, shared_copy(base), case_of(name, case))
    tokens = work.tokens(base.config.vocab_size)
    for _ in range(2):
        own.step(tokens)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    own.contexts.close()
    return peak


def largest_batch(work: Workload, base: Any, case: Case, most: int = 256) -> int:
    """The largest power of two of texts for which PEFT's step has memory; memory grows linearly with them."""
    one, two = (peak_bytes(replace(work, batch=batch), base, PEFT, case) for batch in (1, 2))
    if one is None or two is None:
        return work.batch
    room = _MEMORY_SHARE * torch.cuda.get_device_properties(work.device).total_memory
    batch = 1
    while 2 * batch <= most and one + (2 * batch - 1) * max(1, two - one) <= room:
        batch *= 2
    return batch


def warm(own: Subject, tokens: torch.Tensor) -> None:
    """Take steps that do not count; raise SystemExit where a loss is not finite."""
    for _ in range(WARM_STEPS):
        loss = own.step(tokens)
    if not torch.isfinite(loss):
        raise SystemExit(f"{own.name}: its loss is not finite")


def measure(work: Workload, base: Any, case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and ratios of each way, by name, the floor among them."""
    tokens = work.tokens(base.config.vocab_size)
    own = {name: subject(name, shared_copy(base), case_of(name, case)) for name in (FLOOR, *WAYS)}
    for one in own.values():
        warm(one, tokens)
    calls = {name: partial(one.step, tokens) for name, one in own.items()}
    seconds, ratios = in_turn(calls, rounds, work.device)
    for one in own.values():
        one.contexts.close()
    return {name: {"all_seconds": seconds[name], "ratios": ratios.get(name)} for name in own}


def measure_liger(work: Workload, base: Any, case: Case, rounds: int, floor: float) -> dict[str, Any]:
    """Seconds of PEFT with Liger's kernels; ratios over the floor's median."""
    tokens = work.tokens(base.config.vocab_size)
    own = subject(PEFT_LIGER, shared_copy(base), case)
    warm(own, tokens)
    seconds = [seconds_of(lambda: own.step(tokens), work.device) for _ in range(2 * rounds)]
    return {"all_seconds": seconds, "ratios": [second / floor for second in seconds]}


def rows_of(work: Workload, case: Case, rounds: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of one model, length and set of targets, the floor first; not those of Liger."""
    base = base_model(work)
    work = replace(work, batch=largest_batch(work, base, case))
    memory = {name: peak_bytes(work, base, name, case) for name in (FLOOR, *WAYS) if name != CONTROL}
    results = measure(work, base, case, rounds)
    return [row(work, case, name, result, memory.get(name), ceilings) for name, result in results.items()]


def row(
    work: Workload, case: Case, name: str, result: dict[str, Any], peak: int | None, ceilings: Ceilings
) -> dict[str, Any]:
    """One way's figures."""
    shape = shape_of(work)
    weights = sum(module.weight.numel() for module in shape.modules() if isinstance(module, torch.nn.Linear))
    tokens = work.batch * work.length
    median = statistics.median(result["all_seconds"])
    operations = flops(shape, work, (FLOOR if name == CONTROL else name, case_of(name, case)))
    # Each frozen weight is read forward and back; activations are left out.
    floor_bytes = 2 * weights * 2
    return {
        "size": work.size,
        "length": work.length,
        "batch": work.batch,
        **asdict(case),
        "way": name,
        "seconds": median,
        "ratio": None if result["ratios"] is None else statistics.median(result["ratios"]),
        "interval": None if result["ratios"] is None else median_interval(result["ratios"]),
        "ratios": result["ratios"],
        "peak_bytes": peak,
        "flops": operations,
        "utilisation": 4 * weights * tokens / median / ceilings.flops_per_second,
        "floor_seconds": ceilings.seconds(operations, floor_bytes),
        "bound_by": ceilings.bound(operations, floor_bytes),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, quick="two layers, two rounds: does it run?", rounds=10)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    arguments = parsed(parser, argv, "gpu-train-step.json")
    if arguments.quick:
        arguments.size, arguments.rounds, arguments.length = ["135m"], 2, [16]
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    require_cuda(arguments.device)
    say = Console(stderr=True).print
    small: dict[str, Any] = {"layers": 2, "vocabulary": 512, "batch": 2} if arguments.quick else {"batch": 1}
    ceilings = ceilings_of(arguments.device, quick=arguments.quick)
    result: dict[str, Any] = {
        "machine": describe_device(arguments.device),
        "ceilings": asdict(ceilings),
        "rounds": arguments.rounds,
        "rank": RANK,
        "not_measured": [
            *([] if installed("liger_kernel") else ["PEFT + Liger: liger-kernel is not installed"]),
            "Unsloth: its import changes transformers and PEFT for the whole process, other ways too",
        ],
        "parity": [],
        "rows": [],
    }
    chosen = [
        (
            Workload(
                "bfloat16", attention="sdpa", size=size, length=length, device=arguments.device, **small
            ),
            targets,
        )
        for size, length, targets in product(arguments.size, arguments.length, arguments.targets)
    ]
    for targets in arguments.targets:
        work = replace(chosen[0][0], layers=None, vocabulary=512)
        compiled = [name for name in WAYS if name in COMPILED]
        errors = parity(work, Case(targets, RANK, 0.0), (*ADAPTED, *compiled))
        result["parity"] += [{"targets": targets, "way": name, **own} for name, own in errors.items()]
    for work, targets in chosen:
        say(f"{work.size}, {work.length} tokens, {targets}")
        result["rows"] += rows_of(work, Case(targets, RANK, 0.0), arguments.rounds, ceilings)
    if installed("liger_kernel"):
        for work, targets in chosen:
            result["rows"].append(
                liger_row(result["rows"], work, Case(targets, RANK, 0.0), arguments.rounds, ceilings)
            )
    result["checks"] = checks(result["rows"])
    write_result(arguments.out, result)
    screen = Console(width=160)
    screen.print(rows_table(result["rows"]))
    screen.print(checks_table(result["checks"]))


def liger_row(
    rows: Sequence[dict[str, Any]], work: Workload, case: Case, rounds: int, ceilings: Ceilings
) -> dict[str, Any]:
    """The row of PEFT with Liger's kernels, with the batch and the floor of the others."""
    key = (work.size, work.length, case.targets)
    (floor,) = (
        one for one in rows if (one["size"], one["length"], one["targets"]) == key and one["way"] == FLOOR
    )
    work = replace(work, batch=floor["batch"])
    base = base_model(work)
    peak = peak_bytes(work, base, PEFT_LIGER, case)
    result = measure_liger(work, base, case, rounds, floor["seconds"])
    return row(work, case, PEFT_LIGER, result, peak, ceilings)


if __name__ == "__main__":
    main()
