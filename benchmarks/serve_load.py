"""Many clients of many tasks on one base: `loracle serve` under load, on the loopback.

The model is SmolLM2-135M in float32 with eight tasks in the form swappable (q and v, r=8, seeded), or
`--model`. Fifty clients ask one question after the other for five minutes, for completions and for chat,
streamed and whole, greedily. Beside them are clients that cut their connections, send what is no JSON, too
much, or for a task that there is not, and one whose task is removed and put back while it asks.

Every answer must be what its task answers alone, in a process that has nothing else to do. Where it is not,
rounding in a batch must explain it: a near-tie in float64, counted apart. No request may fail that should
not. The server's memory is sampled every second; after the warm-up, the first fifth of the time, neither its
resident set nor the anonymous part of it may grow by more than two per cent. The proportional set is shown
as well: it moves with every other process that has the same libraries.

    python -m benchmarks.serve_load [--clients 50] [--tasks 8] [--minutes 5] [--quick] [--threads 2]
        [--model DIR] [--scratch DIR] [--out benchmarks/results/serve_load.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.console import Console

from loracle.demo.smollm2 import model_folder
from loracle.export.names import TASK_SUFFIX

from .llama_model import LlamaShape, write_llama
from .machine import describe
from .serve_load_cases import Case, Expected, NearTie, cases_of, distinct_share, expect, explain
from .serve_load_clients import Answered, Seen, run_clients
from .serve_load_server import Memory, ServerProcess, Trend, trend
from .tables import plain_table

TINY = LlamaShape(64, 2, 4, 2, 128, 512)
TARGETS = ("q_proj", "v_proj")
REMOVABLE = "removable"
WARM_UP = 0.2
GROWTH = 0.02
CHECKED = ("resident", "anonymous")
# Two of killed clients, eleven of wrong requests, two outcomes for a task that is removed.
_KINDS = 15
# A trend over less than this many seconds says nothing.
_LEAST_SECONDS = 120


def make_deployment(base: Path, work: Path, tasks: Sequence[str]) -> Path:
    """A folder with the base and so many tasks, and the adapters beside it."""
    from loracle.export import export

    from .adapters import random_adapter

    for number, task in enumerate(tasks):
        adapter = random_adapter(base, work / "adapters" / task, r=8, alpha=64, targets=TARGETS, seed=number)
        export(base, work / "deployment", adapter, form="swappable", name=task)
    return work / "deployment"


def mismatches(
    seen: Seen, expected: Mapping[Case, Expected], base: Path, work: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Answers that are not those of the task alone: those that rounding explains, and the others."""
    found: dict[tuple[Case, str], int] = {}
    for answered in seen.answered:
        if answered.text != expected[answered.case].text:
            key = (answered.case, answered.text)
            found[key] = found.get(key, 0) + 1
    explained: dict[str, dict[str, Any]] = {}
    wrong = []
    for (case, text), count in found.items():
        tie: NearTie | None = explain(
            base, work / "adapters" / case.task, work / "deployment", expected[case], text
        )
        name = f"{case.task}, {'chat' if case.chat else 'text'}: {case.question}"
        if tie is None:
            wrong.append(f"{name}: {text!r}, and alone {expected[case].text!r} ({count} times)")
        else:
            explained[f"{name}: token {tie.place}"] = {"answers": count, **asdict(tie)}
    return explained, wrong


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    found = np.percentile(values, (50, 95, 99)) if values else (0.0, 0.0, 0.0)
    return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))


def figures(answered: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """Requests and tokens a second, and latencies."""
    return {
        "requests": len(answered),
        "requests_per_second": len(answered) / seconds,
        "tokens_per_second": sum(one.tokens for one in answered) / seconds,
        "latency_seconds": percentiles([one.seconds for one in answered]),
        "first_token_seconds": percentiles([one.first for one in answered if one.first is not None]),
    }


def trends(samples: Sequence[Memory]) -> dict[str, Trend]:
    """How each set goes after the warm-up."""
    later = samples[int(WARM_UP * len(samples)) :]
    return {
        name: trend([(one.seconds, getattr(one, name)) for one in later])
        for name in (*CHECKED, "proportional")
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The result as tables."""
    table = plain_table(f"{result['clients']} clients, {result['tasks']} tasks", ("figure", "value"))
    answers = result["answers"]
    table.add_row("answers", str(answers["requests"]))
    table.add_row("answers that a near-tie explains", str(result["near_tie_answers"]))
    table.add_row("wrong answers", str(len(result["wrong"])))
    table.add_row("errors", str(len(result["errors"])))
    table.add_row("requests/s", f"{answers['requests_per_second']:.2f}")
    table.add_row("tokens/s", f"{answers['tokens_per_second']:.1f}")
    for name in ("latency_seconds", "first_token_seconds"):
        values = " / ".join(f"{answers[name][p]:.2f}" for p in ("p50", "p95", "p99"))
        table.add_row(f"{name.replace('_', ' ')}, p50 / p95 / p99", values)
    console.print(table)
    table = plain_table("memory after the warm-up", ("set", "MB", "MB at the end", "MB/minute", "growth"))
    for name, own in result["memory"].items():
        sizes = (own["start"] / 1e6, own["end"] / 1e6, own["per_minute"] / 1e6)
        table.add_row(name, *(f"{size:.1f}" for size in sizes), f"{own['growth']:.2%}")
    console.print(table)
    table = plain_table("bad clients", ("kind", "times"))
    for kind, count in sorted(result["bad"].items()):
        table.add_row(kind, str(count))
    console.print(table)


def failures(result: Mapping[str, Any], kinds: int) -> list[str]:
    """What must not be.

    Args:
        kinds: of bad clients that there are.
    """
    found = [*result["wrong"][:5], *result["errors"][:5], *result["faults"][:5]]
    if result["exit_code"] != 0:
        found.append(f"exit code: expected 0, got {result['exit_code']}")
    if result["left"]:
        found.append(f"prompts left when all clients had gone: {result['left']:g}")
    if len(result["bad"]) != kinds:
        found.append(f"bad clients: expected {kinds} kinds, got {', '.join(result['bad'])}")
    if result["seconds"] >= _LEAST_SECONDS:
        found += [
            f"memory, {name}: grew by {own['growth']:.1%}, expected at most {GROWTH:.0%}"
            for name, own in result["memory"].items()
            if name in CHECKED and own["growth"] > GROWTH
        ]
    return found


def left_over(address: str) -> float:
    """Prompts that the server still has to answer."""
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    names = ("loracle_waiting_prompts ", "loracle_running_prompts ")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, help="50")
    parser.add_argument("--tasks", type=int, help="8")
    parser.add_argument("--minutes", type=float, help="5")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, and 6, 3 and 1/6 unless they are given: does it run? Writes no file unless --out",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a folder of transformers, of Llama's architecture")
    parser.add_argument("--scratch", type=Path, help="a folder for models")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.quick and arguments.out is None:
        arguments.out = Path("benchmarks/results/serve_load.json")
    usual = (6, 3, 1 / 6) if arguments.quick else (50, 8, 5.0)
    for name, value in zip(("clients", "tasks", "minutes"), usual, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if min(arguments.clients, arguments.tasks) < 1 or arguments.minutes <= 0:
        parser.error("--clients, --tasks, --minutes: expected at least 1 client, 1 task and some time")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        base = arguments.model or (
            write_llama(work / "tiny", TINY) if arguments.quick else model_folder(progress=say)
        )
        say("deployment")
        tasks = [f"task{number}" for number in range(arguments.tasks)]
        folder = make_deployment(base, work, [*tasks, REMOVABLE])
        kept = work / "kept"
        os.link(folder / f"{REMOVABLE}{TASK_SUFFIX}", kept)
        chat = (folder / "chat_template.jinja").is_file()
        say("what each task answers alone")
        cases = cases_of(tasks, chat=chat)
        expected = expect(folder, [*cases, *cases_of([REMOVABLE], chat=chat)], arguments.threads)
        removable = {case: own for case, own in expected.items() if case.task == REMOVABLE}
        say("load")
        server = ServerProcess(folder, ["--threads", str(arguments.threads)], work / "log")
        seconds = 60 * arguments.minutes
        try:
            seen = asyncio.run(
                run_clients(server.address, arguments.clients, cases, removable, folder, kept, seconds)
            )
            left = left_over(server.address)
        finally:
            code = server.stop()
        say("comparing")
        explained, wrong = mismatches(seen, expected, base, work)
        faults = server.faults()
    result = {
        "machine": describe("onnxruntime", "starlette", "uvicorn"),
        "model": "tiny" if arguments.quick else base.name,
        "clients": arguments.clients,
        "tasks": arguments.tasks,
        "seconds": seconds,
        "threads": arguments.threads,
        "distinct_questions": distinct_share(expected),
        "answers": figures(seen.answered, seconds),
        "near_tie_answers": sum(one["answers"] for one in explained.values()),
        "near_ties": explained,
        "wrong": wrong,
        "errors": seen.errors,
        "faults": faults,
        "bad": dict(seen.bad),
        "left": left,
        "exit_code": code,
        "memory": {name: asdict(own) for name, own in trends(server.samples).items()},
        "samples": [asdict(one) for one in server.samples],
    }
    show(result, Console())
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    found = failures(result, _KINDS)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
