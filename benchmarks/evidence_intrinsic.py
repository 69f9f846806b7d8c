"""The intrinsic dimension of all-MiniLM-L6-v2 on a real classification task, by `loracle intrinsic`.

The task is `benchmarks.evidence_data`'s: which of six libraries is the first line of a docstring from?
The whole model (22.7 million parameters) and its random subspaces learn from the same rows in the same number
of steps; learning rates are chosen on a split of their own. A run that is ended early goes on where it was.

    python -m benchmarks.evidence_intrinsic [--quick] [--projection said] [--work DIR]
        [--out benchmarks/results]

It writes OUT/intrinsic.json and OUT/intrinsic.png; with `--projection said` OUT/intrinsic_said.json and .png.
On two cores an hour or two; `--quick` is one seed and ten steps, to see that it runs, and writes to the
working folder where no OUT is given.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from loracle.cli.progress import training_bar
from loracle.demo import minilm
from loracle.torch_impl.intrinsic import IntrinsicOptions, IntrinsicResult, measure_intrinsic_dimension

from .evidence_data import ClassificationFiles, files_in
from .evidence_options import keep, parsed, parser_of
from .tables import plain_table

DIMS = (100, 1_000, 3_000, 10_000)
RATES = (1e-3, 3e-3)


def options_of(
    files: ClassificationFiles, model: Path, out: Path, *, projection: str, quick: bool
) -> IntrinsicOptions:
    """The settings of one measurement."""
    budget: dict[str, Any] = {
        "dims": DIMS,
        "lr": RATES,
        "full_lr": (1e-4, 3e-4),
        "seeds": (0, 1),
        "epochs": 5.0,
    }
    if quick:
        budget |= {"dims": (100, 1_000), "lr": RATES[1:], "full_lr": (3e-4,)}
        budget |= {"seeds": (0,), "max_steps": 10}
    return IntrinsicOptions(
        model=str(model),
        data=files.train,
        test_data=files.test,
        out=out,
        projection=cast(Any, projection),
        batch_size=32,
        max_length=48,
        bf16=False,
        resume=True,
        **budget,
    )


def table_of(result: IntrinsicResult) -> Any:
    """The result for a person."""
    table = plain_table(
        f"d90 = {result.dimension.d90}, above the start {result.dimension.d90_above_start}",
        ["d", "learning rate", result.metric, "of the full score", "seeds from, to"],
    )
    for point in (*result.points, result.full):
        table.add_row(
            f"{result.parameters if point.d is None else point.d:,}",
            f"{point.lr:g}",
            f"{point.score:.3f}",
            f"{point.score / result.full.score:.3f}",
            f"{point.low:.3f}, {point.high:.3f}",
        )
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "one seed, few steps")
    parser.add_argument("--projection", choices=("auto", "said"), default="auto")
    return parsed(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    say = Console(stderr=True).print
    name = "intrinsic_said" if arguments.projection == "said" else "intrinsic"
    made = arguments.work / (f"{name}_quick" if arguments.quick else name)
    model = minilm.model_folder(progress=say)
    files = files_in(arguments.work, quick=arguments.quick)
    say(f"{files.train_rows} rows to train on and {files.test_rows} to score, {files.origin}")
    shutil.rmtree(made, ignore_errors=True)
    options = options_of(files, model, made, projection=arguments.projection, quick=arguments.quick)
    with training_bar() as advance:
        result = measure_intrinsic_dimension(options, advance)
    keep(arguments.out, {f"{name}{suffix}": made / f"intrinsic{suffix}" for suffix in (".json", ".png")})
    Console(width=120).print(table_of(result))


if __name__ == "__main__":
    main()
