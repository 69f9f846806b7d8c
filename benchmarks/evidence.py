"""All of the evidence, one measurement after the other, and the page that shows it.

    python -m benchmarks.evidence [--quick] [--again] [--work DIR] [--out benchmarks/results]

Each measurement is a module of its own (STAGES). One that has ended is not made again unless `--again`
says so, and most go on where they were: a run that was ended early costs little. The latency table wants
a machine that does nothing else. On two cores all take most of a day; `--quick`, of small models and few
steps, minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.files import write_atomic

PAGE = "evidence.html"


@dataclass(frozen=True)
class Stage:
    """A measurement.

    Attributes:
        name: of the mark that it has ended.
        words: the module's name and its arguments.
        works: whether it has a working folder.
    """

    name: str
    words: tuple[str, ...]
    works: bool = True


STAGES = (
    Stage("bench", ("evidence_bench",), works=False),
    Stage("task", ("evidence_task",)),
    Stage("rank-library", ("evidence_rank", "--only", "library", "--seeds", "0,1,2")),
    Stage("rank-translate", ("evidence_rank", "--only", "translate", "--seeds", "0")),
    Stage("rank-summarize", ("evidence_rank", "--only", "summarize", "--seeds", "0", "--steps", "50")),
    Stage("intrinsic", ("evidence_intrinsic",)),
    Stage("intrinsic-said", ("evidence_intrinsic", "--projection", "said")),
)


def command_of(stage: Stage, work: Path, out: Path, *, quick: bool) -> list[str]:
    """The command of a stage."""
    module, *arguments = stage.words
    if quick:
        if "--seeds" in arguments:
            arguments[arguments.index("--seeds") + 1] = "0"
        if "--steps" in arguments:  # a quick run has its own
            at = arguments.index("--steps")
            del arguments[at : at + 2]
        arguments.append("--quick")
    if stage.works:
        arguments += ["--work", str(work)]
    return [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="do all of them run?")
    parser.add_argument("--again", action="store_true", help="also what has ended already")
    parser.add_argument("--work", type=Path, help="build/evidence, or build/evidence-quick, by default")
    parser.add_argument(
        "--out", type=Path, help="benchmarks/results; with --quick the working folder's results"
    )
    arguments = parser.parse_args(argv)
    if arguments.work is None:
        arguments.work = Path("build/evidence-quick" if arguments.quick else "build/evidence")
    if arguments.out is None:
        arguments.out = arguments.work / "results" if arguments.quick else Path("benchmarks/results")
    arguments.again = arguments.again or arguments.quick
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        mark = arguments.work / f"{stage.name}.ended"
        if mark.exists() and not arguments.again:
            print(f"{stage.name}: ended before; --again makes it again", flush=True)
            continue
        start = time.monotonic()
        subprocess.run(command_of(stage, arguments.work, arguments.out, quick=arguments.quick), check=True)
        write_atomic(mark, b"")
        print(f"{stage.name}: {time.monotonic() - start:.0f} seconds", flush=True)
    page = str(arguments.out / PAGE)
    subprocess.run(
        [sys.executable, "-m", "loracle.cli", "report", str(arguments.out), "--out", page], check=True
    )


if __name__ == "__main__":
    main()
