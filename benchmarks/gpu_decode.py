"""Decoding a merged model on a GPU: onnxruntime's CUDA provider and torch, over what its memory allows.

A Llama of TinyLlama-1.1B's shape with random weights and an adapter of all linear layers merged, exported in
float16. Ours is `loracle run`'s session and loop, whose cache stays on the device; beside it transformers'
`generate` on the merged checkpoint in float16, with its growing cache and with a static one. Each answers
prompts of 18 and 256 tokens with 140, greedily, in turn, O X X O Y Y O ...; the clock is the host's, which
waits for every token.

The bound: a token reads every weight once, at the rate at which the device copies memory.

It also counts, from onnxruntime's profile, which nodes of a step ran elsewhere than on the device.

    python -m benchmarks.gpu_decode [--quick] [--device cuda] [--rounds 5] [--tokens 140]
        [--out benchmarks/results/gpu-decode.json]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from loracle.export import export
from loracle.export.bench.runner import check_provider
from loracle.export.providers import PROVIDERS
from loracle.files import write_merged_checkpoint
from loracle.torch_impl.loading import quiet_transformers

from .adapters import random_adapter
from .answer import Answer
from .decode_folders import weight_bytes
from .decode_transformers import timed_generate
from .decode_ways import ours
from .export_models import MIDDLE, MODELS, TINY
from .gpu_ceilings import ceilings_of
from .gpu_machine import describe_device, require_cuda, write_result
from .gpu_nodes import nodes_of_a_step
from .gpu_options import parsed, parser_of
from .interleaved import Opened, Seconds, chain, timed
from .intervals import median_interval
from .llama_model import write_llama
from .tables import plain_table

OURS, GROWING, STATIC = "loracle", "transformers", "transformers, static cache"


def transformers_way(model: Any, *, static: bool) -> Opened:
    """`generate` on a model that is loaded."""
    options = {"cache_implementation": "static"} if static else {}

    def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
        return timed_generate(model, prompt, new_tokens, options)

    return answer


def measure(
    ways: dict[str, Opened], prompt: Sequence[int], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for each way, ours first."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    runs = {name: timed(way, prompt, new_tokens, seconds[name]) for name, way in ways.items()}
    others = [name for name in ways if name != OURS]
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for run in runs.values():  # what is compiled for a shape is compiled now
        run()
    for own in seconds.values():
        own.clear()
    for round_ in range(rounds):
        turn = others[:: 1 if round_ % 2 == 0 else -1]
        for name, (_, decode) in zip(turn, chain(runs[OURS], [runs[name] for name in turn]), strict=True):
            ratios[name].append(decode)
    return [
        {
            "prompt": len(prompt),
            "way": name,
            "prefill_seconds": statistics.median(first for first, _ in seconds[name]),
            "tokens_per_second": (new_tokens - 1) / statistics.median(rest for _, rest in seconds[name]),
            "over_ours": None if name == OURS else statistics.median(ratios[name]),
            "interval": None if name == OURS else median_interval(ratios[name]),
        }
        for name in ways
    ]


def agreement(ways: dict[str, Opened], prompt: Sequence[int], new_tokens: int) -> dict[str, int]:
    """Of each way, how many of its first tokens are ours: in float16 two near ones may change places."""
    expected = ways[OURS](prompt, new_tokens).tokens
    found = {}
    for name, way in ways.items():
        pairs = zip(way(prompt, new_tokens).tokens, expected, strict=True)
        found[name] = next((at for at, (own, other) in enumerate(pairs) if own != other), new_tokens)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, quick="a tiny model, two rounds: does it run?", rounds=5)
    parser.add_argument("--tokens", type=int, default=140)
    arguments = parsed(parser, argv, "gpu-decode.json")
    if arguments.quick:
        arguments.rounds, arguments.tokens = 2, 8
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = arguments.device
    require_cuda(device)
    check_provider(device)
    model = MODELS[TINY if arguments.quick else MIDDLE]
    assert model.shape is not None
    ceilings = ceilings_of(device, quick=arguments.quick)
    result: dict[str, Any] = {
        "machine": describe_device(device),
        "ceilings": asdict(ceilings),
        "model": model.name,
        "new_tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = write_llama(work / "base", model.shape, model.stored)
        adapter = random_adapter(base, work / "adapter")
        export(base, work / "onnx", adapter, dtype="fp16")
        write_merged_checkpoint(base, adapter, work / "checkpoint")
        with quiet_transformers():
            torch_model = AutoModelForCausalLM.from_pretrained(
                work / "checkpoint", dtype=torch.float16, local_files_only=True
            )
        torch_model.to(device)
        result["weight_bytes"] = weight_bytes(work / "checkpoint")
        result["nodes"] = nodes_of_a_step(work / "onnx", device, work)
        ways = {
            OURS: ours(work / "onnx", 0),
            GROWING: transformers_way(torch_model, static=False),
            STATIC: transformers_way(torch_model, static=True),
        }
        bound = ceilings.bytes_per_second / result["weight_bytes"]
        for length in (18, 256):
            prompt = [3 + at % 200 for at in range(length)]
            result.setdefault("agreeing_tokens", {})[str(length)] = agreement(ways, prompt, arguments.tokens)
            for row in measure(ways, prompt, arguments.tokens, arguments.rounds):
                result["rows"].append({**row, "bound_share": row["tokens_per_second"] / bound})
        # Sessions of the device hold its memory, and the files of the folder.
        ways.clear()
    write_result(arguments.out, result)
    show(result, PROVIDERS[device])


def show(result: dict[str, Any], provider: str) -> None:
    """Print the result for a person."""
    table = plain_table(
        f"decoding {result['model']}, float16, {result['weight_bytes'] / 1e9:.2f} GB a token",
        ("prompt", "way", "tokens a second", "of the bound", "time over ours", "prefill ms"),
    )
    for row in result["rows"]:
        over = "" if row["over_ours"] is None else f"{row['over_ours']:.3f}"
        figures = (f"{row['tokens_per_second']:.1f}", f"{row['bound_share']:.3f}", over)
        table.add_row(str(row["prompt"]), row["way"], *figures, f"{1e3 * row['prefill_seconds']:.2f}")
    screen = Console(width=120)
    screen.print(table)
    for name, counts in result["nodes"].items():
        if name != provider:
            elsewhere = ", ".join(f"{count} {operator}" for operator, count in counts.items())
            screen.print(f"{name}: {elsewhere}")
    if set(result["nodes"]) == {provider}:
        screen.print(f"all {sum(result['nodes'][provider].values())} nodes of a step on {provider}")


if __name__ == "__main__":
    main()
