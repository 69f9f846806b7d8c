"""Everything that needs a GPU: the tests, then the measurements, with result files.

    python -m benchmarks.gpu [--quick] [--only tests merge ...] [--out benchmarks/results]

It needs no network. A part that fails is named at the end, the others are run, and the exit code is 1 then.
Without a CUDA device nothing is run, and the exit code is 2; `--quick --device cpu` runs the measurements of
small models on the CPU, to see that they run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .gpu_options import RESULTS

TESTS = "tests"
PARTS = {
    "merge": ("gpu_merge", "gpu-merge.json"),
    "train-step": ("gpu_train_step", "gpu-train-step.json"),
    "decode": ("gpu_decode", "gpu-decode.json"),
    "table1": ("gpu_table1", "gpu-table1.json"),
}
LATENCY = "latency"
NAMES = (TESTS, *PARTS, LATENCY)


def command_of(name: str, out: Path, device: str, *, quick: bool) -> list[str]:
    """The command of a part."""
    python = [sys.executable, "-m"]
    if name == TESTS:
        return [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if name == LATENCY:
        flags = ["--quick"] if quick else ["--provider", device]
        return [*python, "benchmarks.evidence_bench", *flags, "--out", str(out / "gpu-latency")]
    module, file = PARTS[name]
    flags = ["--quick"] if quick else []
    return [*python, f"benchmarks.{module}", *flags, "--device", device, "--out", str(out / file)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models: do all of them run?")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--out", type=Path, help="benchmarks/results by default; with --quick build/gpu-quick"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu: expected --quick beside it; on the CPU only small models are run")
    if arguments.out is None:
        arguments.out = Path("build/gpu-quick") if arguments.quick else RESULTS
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("expected a CUDA device, found none; run this on a machine that has one", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only:
        start = time.monotonic()
        command = command_of(name, arguments.out, arguments.device, quick=arguments.quick)
        code = subprocess.run(command, check=False).returncode
        print(f"{name}: exit code {code}, {time.monotonic() - start:.0f} seconds", flush=True)
        if code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
