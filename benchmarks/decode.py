"""Decoding: loracle's loop on the merged graph against onnxruntime-genai, transformers and Optimum.

The model is SmolLM2-135M in float32 with an adapter of all linear layers merged (r=8, seeded), or `--model`;
every way answers prompts of 18 and of 256 tokens with 140 tokens, greedily, with two threads, and nothing
ends an answer early. A way's prefill is timed to its first token, its decoding from there.

- loracle: `loracle.export`'s session and `generate`, as in `loracle run`, on `loracle export`'s folder
- A/A control: the same, opened once more
- base model: the same, on the base model's export. It reads the merged model's text, and merging must cost
  nothing
- adapter unmerged: the same, on a graph with the adapter beside the weights
- onnxruntime-genai: its runtime, on its own builder's graph of the merged checkpoint
- genai, our graph: its runtime, on `loracle export`'s folder
- transformers: `generate` on the merged checkpoint, with the attention and the cache that a trial finds
  fastest
- Optimum: its exported graph in its own decoder, in a process of its own; inputs bound or not, by trial

First, parity: every way of the merged model must choose our tokens, or explain the first other one
(`decode_parity`). Then time, in rounds. A round opens every model anew, and for each prompt runs one chain in
which every way stands twice between two answers of ours, O X X O Y Y O ..., backwards in every second round.
A short answer that is not timed goes before each. A way's ratio in a round is (X + X) / (O + O) with our
answers beside it; the figure is the median over the rounds, with an interval from order statistics.

The bound: all weights are read once a token (the cache, a few per cent of them here, is left out), as fast as
the same number of threads reads an array in the same round.

    python -m benchmarks.decode [--rounds 6] [--quick] [--ways ...] [--model DIR] [--prompts 18 256]
        [--tokens 140] [--threads 2] [--optimum .venv-peers/bin/python] [--out benchmarks/results/decode.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loracle.demo.smollm2 import model_folder

from .bandwidth import read_bandwidth
from .decode_folders import Folders, make_folders, prompt
from .decode_parity import Prompt, Text, differences
from .decode_report import checks, checks_table, differences_table, row_of, rows_table
from .decode_ways import (
    BASE,
    CONTROL,
    GENAI,
    GENAI_OURS,
    OPTIMUM,
    OURS,
    TRANSFORMERS,
    UNMERGED,
    WAYS,
    Subject,
    best_transformers,
    genai,
    optimum_process,
    ours,
    ours_forced,
)
from .interleaved import Seconds, Times, chain, timed
from .llama_model import LlamaShape, write_llama
from .machine import describe
from .peers import PEERS_PYTHON, check_python

TINY = LlamaShape(64, 2, 4, 2, 128, 512)


def subjects_of(
    folders: Folders,
    wanted: Collection[str],
    prompts: Sequence[Prompt],
    texts: Mapping[Prompt, Text],
    threads: int,
    peers: Path,
    stack: ExitStack,
) -> tuple[list[Subject], dict[str, Any]]:
    """What is compared, ours first; and the settings that were chosen. Processes end with `stack`.

    Args:
        texts: for each prompt what the base model reads and onnxruntime-genai will answer; not read before
            their models are opened.
    """
    graphs = folders.graphs
    settings: dict[str, Any] = {}
    subjects = [Subject(OURS, lambda: ours(graphs[OURS], threads))]
    for name in (name for name in WAYS if name in wanted):
        if name == CONTROL:
            subjects.append(Subject(name, lambda: ours(graphs[OURS], threads)))
        elif name == BASE:
            subjects.append(Subject(name, lambda: ours_forced(graphs[BASE], threads, texts)))
        elif name == UNMERGED:
            subjects.append(Subject(name, lambda: ours(graphs[UNMERGED], threads)))
        elif name == GENAI:
            subjects.append(Subject(name, lambda: genai(graphs[GENAI], threads, texts)))
        elif name == GENAI_OURS:
            subjects.append(Subject(name, lambda: genai(graphs[OURS], threads, texts)))
        elif name == TRANSFORMERS:
            settings[name], opens = best_transformers(folders.checkpoint, prompts[0])
            subjects.append(Subject(name, opens))
        elif name == OPTIMUM:
            process = stack.enter_context(optimum_process(peers, graphs[OPTIMUM], threads))
            settings[name], opens = process.best(prompts[0])
            subjects.append(Subject(name, opens))
    return subjects, settings


def check_parity(
    folders: Folders,
    subjects: Sequence[Subject],
    prompts: Sequence[Prompt],
    texts: dict[Prompt, Text],
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Put our answers into `texts`, and hold every way's against them; return what rounding explains.

    Raises SystemExit where a way computes another model.
    """
    others: dict[tuple[str, Prompt], Text] = {}
    for subject in subjects:
        if subject.name in (CONTROL, BASE):
            continue
        answer = subject.open()
        for own in prompts:
            text = answer(own, new_tokens).tokens
            if subject.name == OURS:
                texts[own] = text
            else:
                others[subject.name, own] = text
        del answer
        gc.collect()
    found = differences(folders.base, folders.adapter, texts, others)
    return [
        {"way": name, "prompt": len(own), **asdict(difference)} for (name, own), difference in found.items()
    ]


def measure(
    subjects: Sequence[Subject], prompts: Sequence[Prompt], new_tokens: int, rounds: int, threads: int
) -> tuple[dict[tuple[str, Prompt], Times], list[float]]:
    """Each way's times with each prompt, and the bandwidth in bytes a second; a number for each round."""
    times = {(subject.name, own): Times() for own in prompts for subject in subjects}
    bandwidths = []
    for round_ in range(rounds):
        turn = slice(None, None, 1 if round_ % 2 == 0 else -1)
        bandwidths.append(read_bandwidth(threads))
        answers = {subject.name: subject.open() for subject in subjects[turn]}
        for own in prompts:
            seconds: dict[str, list[Seconds]] = {name: [] for name in answers}
            runs = {name: timed(answer, own, new_tokens, seconds[name]) for name, answer in answers.items()}
            ways = [subject.name for subject in subjects[1:]][turn]
            gc.collect()
            gc.disable()
            try:
                ratios = list(chain(runs[subjects[0].name], [runs[name] for name in ways]))
            finally:
                gc.enable()
            for name, (prefill, decode) in zip(ways, ratios, strict=True):
                times[name, own].prefill_ratios.append(prefill)
                times[name, own].decode_ratios.append(decode)
            for name, taken in seconds.items():
                times[name, own].prefill.append(sum(first for first, _ in taken) / len(taken))
                times[name, own].decode.append(sum(rest for _, rest in taken) / len(taken))
        del answers, runs
    return times, bandwidths


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model, a few tokens, one round: does it run? Writes no file unless --out",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument(
        "--model", type=Path, help="a folder of transformers, of Llama's architecture, float32"
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[18, 256])
    parser.add_argument("--tokens", type=int, default=140)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimum", type=Path, default=PEERS_PYTHON, help="the Python that has Optimum")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.tokens < 2:
        parser.error(f"--tokens: expected at least 2, got {arguments.tokens}")
    if arguments.quick:
        arguments.rounds, arguments.prompts, arguments.tokens = 1, [4, 8], 6
    elif arguments.out is None:
        arguments.out = Path("benchmarks/results/decode.json")
    if OPTIMUM in arguments.ways:
        check_python(arguments.optimum)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    say = Console(stderr=True).print
    texts: dict[Prompt, Text] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        work = Path(scratch)
        base = arguments.model or (
            write_llama(work / "tiny", TINY) if arguments.quick else model_folder(progress=say)
        )
        prompts = [prompt(base, length) for length in arguments.prompts]
        say("models")
        folders = make_folders(base, work, arguments.ways, arguments.optimum)
        say("settings")
        subjects, settings = subjects_of(
            folders, arguments.ways, prompts, texts, arguments.threads, arguments.optimum, stack
        )
        say("parity")
        explained = check_parity(folders, subjects, prompts, texts, arguments.tokens)
        say("time")
        times, bandwidths = measure(subjects, prompts, arguments.tokens, arguments.rounds, arguments.threads)
    rows = [
        row_of(name, len(own), arguments.tokens, found, folders.weight_bytes, bandwidths)
        for (name, own), found in times.items()
    ]
    result = {
        "machine": describe("onnxruntime", "onnxruntime-genai", "torch", "transformers"),
        "model": "tiny" if arguments.quick else str(base.name),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "tokens": arguments.tokens,
        "settings": settings,
        "weight_bytes": folders.weight_bytes,
        "bandwidths": bandwidths,
        "explained_differences": explained,
        "rows": rows,
        "checks": checks(rows),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    # As wide as the tables are, also where the output is no terminal.
    screen = Console(width=160)
    for table in (differences_table(explained), rows_table(rows), checks_table(result["checks"])):
        if table.row_count:
            screen.print(table)


if __name__ == "__main__":
    main()
