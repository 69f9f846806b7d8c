"""The paper's latency table at settings that two cores take two hours for, as `loracle bench` measures it.

    python -m benchmarks.evidence_bench [--quick] [--provider cuda] [--out benchmarks/results]

On CUDA the settings are the paper's three.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from loracle.cli.bench_text import print_bench
from loracle.cli.progress import bar
from loracle.export.bench.bench import Wanted, bench
from loracle.export.bench.output import write_results
from loracle.export.bench.settings import Effort

SETTINGS = "1x128,1x32,4x8"
QUICK = Wanted("gpt2", "1x16,2x8", layers=2, effort=Effort(3, 1, 0.02, 2))
FULL = Wanted("gpt2-medium", SETTINGS, effort=Effort(10, 12, 0.1, 2))
CUDA = Wanted("gpt2-medium", "paper", provider="cuda", dtype="fp16", effort=Effort(10, 4, 0.1, 2))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers of gpt2, three rounds: does it run?")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="benchmarks/results by default; with --quick no file")
    arguments = parser.parse_args(argv)
    wanted = QUICK if arguments.quick else CUDA if arguments.provider == "cuda" else FULL
    document = bench(wanted, bar)
    out = arguments.out or (None if arguments.quick else Path("benchmarks/results"))
    if out is not None:
        write_results(out, document)
    print_bench(document)


if __name__ == "__main__":
    main()
