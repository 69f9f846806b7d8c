"""The options that every measurement of a device takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("benchmarks/results")


def parser_of(doc: str | None, *, quick: str, rounds: int) -> argparse.ArgumentParser:
    """A parser of `--quick`, `--device`, `--rounds` and `--out`; `quick` says what a quick run is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None, name: str) -> argparse.Namespace:
    """Parse; without `--out` the result is `name` in the repository, and a quick run's goes nowhere."""
    arguments = parser.parse_args(argv)
    if arguments.out is None and not arguments.quick:
        arguments.out = RESULTS / name
    return arguments
