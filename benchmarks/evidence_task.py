"""A task of the demo from fine-tune to certificate: its adapter's ranks, its merge, and the way back.

SmolLM2-135M learns to translate, with the demo's settings, from two seeds. The first seed's adapter is
analysed beside W0 and the second's, exported and verified, outputs included, merged, and extracted from the
merged checkpoint again. Every step is a command that a person can type.

    python -m benchmarks.evidence_task [--quick] [--work DIR] [--out benchmarks/results]

It writes OUT/rank_analysis.json, certificate.json and extract.json. On two cores a quarter of an hour;
`--quick`, two steps and four weights, is two minutes and writes to the working folder where no OUT is given.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loracle.demo import smollm2
from loracle.demo.settings import TRANSLATE
from loracle.demo.tasks import build_tasks
from loracle.files import write_atomic

from .evidence_options import keep, parsed, parser_of

RESULTS = ("rank_analysis.json", "certificate.json", "extract.json")
_QUICK_TARGETS = tuple(
    f"layers.{layer}.self_attn.{name}" for layer in (0, 29) for name in ("q_proj", "v_proj")
)


def finetune_command(data: Path, adapter: str, seed: int, *, quick: bool) -> list[str]:
    """The command that trains an adapter from a seed, in a folder with the base in it."""
    training = TRANSLATE.training
    steps, batch = (2, 2) if quick else (training.max_steps, training.batch_size)
    targets = _QUICK_TARGETS if quick else training.targets
    options: dict[str, object] = {
        "--model": smollm2.FOLDER,
        "--data": data,
        "--out": adapter,
        "--rank": training.rank,
        "--alpha": training.alpha,
        "--targets": ",".join(targets),
        "--max-steps": steps,
        "--batch-size": batch,
        "--lr": training.lr,
        "--max-length": training.max_length,
        "--seed": seed,
    }
    return ["finetune", *(str(word) for option in options.items() for word in option)]


def commands(data: Path, *, quick: bool) -> list[tuple[list[str], str | None]]:
    """The commands in their order, each with the name of the file that what it prints goes to, if any."""
    base, rank = smollm2.FOLDER, str(TRANSLATE.training.rank)
    both = ["--model", base, "--adapter", "adapter"]
    return [
        (finetune_command(data, "adapter", 0, quick=quick), None),
        (finetune_command(data, "other-seed", 1, quick=quick), None),
        (["rank", "analyse", "adapter", "--base", base, "--with", "other-seed", "--json"], RESULTS[0]),
        (["export", *both, "--out", "exported"], None),
        (["verify", "exported", *both, "--certificate", RESULTS[1]], None),
        (["merge", *both, "--out", "merged"], None),
        (
            ["extract", "--base", base, "--tuned", "merged", "--rank", rank, "--out", "extracted", "--json"],
            RESULTS[2],
        ),
    ]


def run(folder: Path, data: Path, *, quick: bool) -> None:
    """Run the commands in a folder with the base in it, and leave their results there."""
    for words, result in commands(data, quick=quick):
        print("loracle", *words, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "loracle.cli", *words],
            cwd=folder,
            stdout=None if result is None else subprocess.PIPE,
            check=True,
        )
        if done.stdout is not None and result is not None:
            write_atomic(folder / result, done.stdout)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return parsed(parser_of(__doc__, "two steps, four weights"), argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    model = smollm2.model_folder(progress=say)
    data = build_tasks(arguments.work / "data", progress=say)[TRANSLATE.name].train.resolve()
    folder = arguments.work / "task"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Results name their inputs as they were given.
    (folder / smollm2.FOLDER).symlink_to(model.resolve(), target_is_directory=True)
    run(folder, data, quick=arguments.quick)
    keep(arguments.out, {name: folder / name for name in RESULTS})


if __name__ == "__main__":
    main()
