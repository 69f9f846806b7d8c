"""What the scripts of the evidence have in common: the options that they take, the files that they keep."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from loracle.files import write_atomic


def parser_of(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser of `--quick`, `--work` and `--out`; `quick` says what a quick run is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--work", type=Path, default=Path("build/evidence"), help="data and finished runs")
    parser.add_argument("--out", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a quick run leaves the results in the repository alone, unless it is told otherwise."""
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = arguments.work if arguments.quick else Path("benchmarks/results")
    return arguments


def keep(out: Path, results: Mapping[str, Path]) -> None:
    """Copy files into `out`, by their names there, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, path in results.items():
        write_atomic(out / name, path.read_bytes())
