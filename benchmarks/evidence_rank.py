"""Which rank and which weights are enough, as the LoRA paper's Table 6, by `loracle rank sweep`.

SmolLM2-135M on both tasks of the demo, and all-MiniLM-L6-v2 as a classifier of `benchmarks.evidence_data`.
Every cell of a table has the same seeds, steps and learning rate; a sweep that is ended early goes on where
it was.

    python -m benchmarks.evidence_rank [--quick] [--only translate] [--steps 100] [--seeds 0,1]
        [--constant-parameters] [--work DIR] [--out benchmarks/results]

For each it writes OUT/rank_NAME.json and OUT/rank_NAME.png. On two cores the full run takes hours, for which
`--steps` is each cell's budget; `--quick` is a corner of the tables, with two of the classifier's libraries,
and writes to the working folder where no OUT is given.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from loracle.cli.progress import training_bar
from loracle.demo import minilm, smollm2
from loracle.demo.settings import TASKS as DEMO_TASKS
from loracle.demo.tasks import build_tasks
from loracle.files import write_atomic
from loracle.torch_impl.rank_sweep import RankSweepOptions, RankSweepResult, sweep_ranks

from .evidence_data import files_in
from .evidence_options import keep, parsed, parser_of
from .tables import plain_table

RANKS = (1, 2, 4, 8, 64)
SETS = ("q", "qv", "qkvo")
CLASSIFIER = "library"
NAMES = (*(task.name for task in DEMO_TASKS), CLASSIFIER)
SCALING = 2.0
"""The demo's, alpha 16 at rank 8, at every rank: with one alpha the scaling of rank 1 were 64 times that of
rank 64, and one learning rate would not suit both."""


@dataclass(frozen=True)
class Subject:
    """A model and a task.

    Attributes:
        name: of the task, and of the result's files.
        model: its folder.
        train, held_out: JSON Lines.
        settings: further options of the sweep.
    """

    name: str
    model: Path
    train: Path
    held_out: Path
    settings: dict[str, Any]


def subjects(work: Path, only: Sequence[str], say: Any, *, quick: bool) -> list[Subject]:
    """The data and the models of the tasks, made where they are missing."""
    found = []
    names = [task.name for task in DEMO_TASKS if task.name in only]
    if names:
        model, files = smollm2.model_folder(progress=say), build_tasks(work / "data", progress=say)
        for task in DEMO_TASKS:
            if task.name in names:
                training, of_task = task.training, files[task.name]
                settings: dict[str, Any] = {
                    "max_steps": training.max_steps,
                    "lr": training.lr,
                    "batch_size": training.batch_size,
                    "max_length": training.max_length,
                }
                found.append(Subject(task.name, model, of_task.train, of_task.heldout, settings))
    if CLASSIFIER in only:
        data = files_in(work, quick=quick)
        settings = {"task": "sequence-classification", "max_steps": 300, "lr": 2e-3, "batch_size": 32}
        found.append(
            Subject(
                CLASSIFIER,
                minilm.model_folder(progress=say),
                data.train,
                data.test,
                {**settings, "max_length": 48},
            )
        )
    return found


def options_of(
    subject: Subject,
    out: Path,
    *,
    quick: bool,
    steps: int | None = None,
    seeds: tuple[int, ...] = (0,),
    constant_parameters: bool = False,
) -> RankSweepOptions:
    """The settings of one sweep."""
    budget: dict[str, Any] = {"ranks": RANKS, "targets": SETS}
    if constant_parameters:  # of q at these ranks, which qkvo can have at rank 1
        budget["ranks"] = (4, 8, 64)
    if quick:
        corner = (4,) if constant_parameters else (1, 8)
        budget = {"ranks": corner, "targets": ("q", "qv"), "max_steps": 2, "batch_size": 2}
    if steps is not None:
        budget["max_steps"] = steps
    return RankSweepOptions(
        model=str(subject.model),
        data=subject.train,
        eval_data=subject.held_out,
        out=out,
        seeds=seeds,
        scaling=SCALING,
        constant_parameters=constant_parameters,
        resume=True,
        **{**subject.settings, **budget},
    )


def shortened(subject: Subject, folder: Path, rows: int) -> Subject:
    """The subject with the first rows of its files alone, in a folder of their own."""
    own = replace(subject, train=folder / subject.train.name, held_out=folder / subject.held_out.name)
    folder.mkdir(parents=True, exist_ok=True)
    for source, path in ((subject.train, own.train), (subject.held_out, own.held_out)):
        with source.open("rb") as lines:
            write_atomic(path, b"".join(islice(lines, rows)))
    return own


def table_of(name: str, result: RankSweepResult) -> Any:
    """The result for a person: a row a target set, a column a rank."""
    ranks = list(dict.fromkeys(entry.rank for entry in result.table))
    table = plain_table(
        f"{name}: {result.metric}, {result.before:.3f} before training",
        ["targets", *(f"r = {rank}" for rank in ranks), "enough"],
    )
    for one in result.enough:
        row = [entry for entry in result.table if entry.targets == one.targets]
        cells = ["diverged" if entry.score is None else f"{entry.score:.3f}" for entry in row]
        table.add_row(one.targets, *cells, "none" if one.r is None else f"r = {one.r}")
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "a corner of the tables, two steps a cell")
    parser.add_argument("--only", choices=NAMES, action="append", help="may be repeated; all by default")
    parser.add_argument("--steps", type=int, help="of each cell")
    parser.add_argument("--seeds", default="0", help="commas between")
    parser.add_argument("--constant-parameters", action="store_true", help="as many as q has in each column")
    arguments = parsed(parser, argv)
    arguments.seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    arguments.only = arguments.only or list(NAMES)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    for subject in subjects(arguments.work, arguments.only, say, quick=arguments.quick):
        name = f"rank_{subject.name}{'_constant' if arguments.constant_parameters else ''}"
        made = arguments.work / (f"{name}_quick" if arguments.quick else name)
        own = shortened(subject, arguments.work / "quick", 8) if arguments.quick else subject
        shutil.rmtree(made, ignore_errors=True)
        options = options_of(
            own,
            made,
            quick=arguments.quick,
            steps=arguments.steps,
            seeds=arguments.seeds,
            constant_parameters=arguments.constant_parameters,
        )
        with training_bar() as advance:
            result = sweep_ranks(options, advance)
        keep(arguments.out, {f"{name}{suffix}": made / f"rank{suffix}" for suffix in (".json", ".png")})
        Console(width=120).print(table_of(subject.name, result))


if __name__ == "__main__":
    main()
