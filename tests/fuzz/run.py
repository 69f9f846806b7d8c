"""Read a great many changed files, on every core; see `oracle.py` for what must come of it.

    python -m tests.fuzz.run [--executions N] [--seed S] [--target NAME ...] [--replay FOLDER]

What an execution reads is a function of the seed, the target and its number alone. A failure leaves its files
in build/fuzz/<target>-<seed>-<number>, and the exit code is 1.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .oracle import Failure, execute, inputs_of, lay_out
from .targets import TARGETS, seeds_of

REPOSITORY = Path(__file__).resolve().parents[2]
KEPT = REPOSITORY / "build" / "fuzz"
EXECUTIONS = 1_100_000

_BATCH = 500
_FAILURES_KEPT = 5
_ADDRESSES = 3 * 2**30  # that a worker may take beside what it has at its start
_GROWTH = 96 * 2**20  # of its memory after the first batches
_WARM_BATCHES = 4


@dataclass
class Tally:
    """What came of one target's executions."""

    executions: int = 0
    seconds: float = 0.0  # of the processor
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def shares(executions: int, targets: Sequence[str]) -> dict[str, int]:
    """Return how many executions each target gets of at least so many."""
    whole = sum(TARGETS[name].share for name in targets)
    return {name: -(-executions * TARGETS[name].share // whole) for name in targets}


def run_batch(target: str, seed: int, numbers: range, folder: Path, at: Any = None) -> Tally:
    """Execute some numbers of a target in this process; ``at.value`` is always the one under way."""
    tally = Tally()
    started = time.process_time()
    for number in numbers:
        if at is not None:
            at.value = number
            if os.environ.get("LORACLE_FUZZ_DIES") == f"{target} {number}":  # so that a test sees it
                os.kill(os.getpid(), signal.SIGKILL)
        files = inputs_of(target, seed, number)
        try:
            tally.outcomes[execute(target, files, folder)] += 1
        except Failure as failure:
            tally.failures.append((number, str(failure)))
        tally.executions += 1
    tally.seconds = time.process_time() - started
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--replay", type=Path, help="a folder of files that one --target reads")
    parser.add_argument("--json", type=Path, help="where the figures are written to")
    given = parser.parse_args(arguments)
    names = given.target or list(TARGETS)
    if given.replay is not None:
        return _replay(names[0], given.replay)
    started = time.perf_counter()
    tallies = _run(names, given.seed, given.executions, given.workers)
    _show(tallies, time.perf_counter() - started)
    for name, tally in tallies.items():
        for number, _ in tally.failures[:_FAILURES_KEPT]:
            _keep(name, given.seed, number)
    if given.json is not None:
        given.json.write_text(
            json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1) + "\n"
        )
    return 1 if any(tally.failures for tally in tallies.values()) else 0


def _replay(target: str, source: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
        try:
            print(execute(target, files, Path(folder)))
        except Failure as failure:
            print(failure)
            return 1
    return 0


@dataclass
class _Worker:
    """A process that executes batches.

    Attributes:
        at: the number under way, which the process tells before it begins with it.
    """

    process: multiprocessing.process.BaseProcess
    connection: Connection
    at: Any
    name: str = ""
    numbers: range = range(0)

    def give(self, name: str, numbers: range) -> None:
        self.name, self.numbers = name, numbers
        self.connection.send((name, numbers))

    def take(self) -> Tally | None:
        """Return the tally of the batch, or None where the process has died of it."""
        try:
            tally: Tally = self.connection.recv()
        except (EOFError, OSError):
            return None
        return tally


def _run(names: Sequence[str], seed: int, executions: int, workers: int) -> dict[str, Tally]:
    waiting = [
        (name, range(start, min(start + _BATCH, count)))
        for name, count in shares(executions, names).items()
        for start in range(0, count, _BATCH)
    ]
    waiting.reverse()
    tallies = {name: Tally() for name in names}
    busy: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    while waiting or busy:
        while waiting and len(busy) < workers:
            worker = idle.pop() if idle else _started(seed)
            worker.give(*waiting.pop())
            busy[worker.connection] = worker
        for connection in wait(list(busy)):
            worker = busy.pop(connection)  # type: ignore[call-overload]
            tally = worker.take()
            if tally is not None:
                idle.append(worker)
            else:  # what came of the numbers before is lost: they are executed again
                worker.process.join()
                at = int(worker.at.value)
                tally = Tally(1, 0.0, Counter(), [(at, f"the process died: {worker.process.exitcode}")])
                rest = (range(worker.numbers.start, at), range(at + 1, worker.numbers.stop))
                waiting += [(worker.name, numbers) for numbers in rest if numbers]
            _add(tallies[worker.name], tally)
    for worker in idle:
        worker.connection.send(None)
        worker.process.join()
    return tallies


def _started(seed: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    at = context.Value("q", 0, lock=False)
    process = context.Process(target=_work, args=(theirs, at, seed), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, at)


def _add(whole: Tally, part: Tally) -> None:
    whole.executions += part.executions
    whole.seconds += part.seconds
    whole.outcomes.update(part.outcomes)
    whole.failures += part.failures


def _work(connection: Connection, at: Any, seed: int) -> None:
    """Execute batches until there is none."""
    import torch

    torch.set_num_threads(1)
    logging.disable()
    for name in TARGETS:
        seeds_of(name)
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust tells of a panic
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _ADDRESSES,) * 2)
    memory: dict[str, list[int]] = {}
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="loracle-fuzz-", dir=place) as folder:
        while (batch := connection.recv()) is not None:
            name, numbers = batch
            tally = run_batch(name, seed, numbers, Path(folder), at)
            seen = memory.setdefault(name, [])
            seen.append(_resident())
            if (
                len(seen) > _WARM_BATCHES
                and seen[-1] - seen[_WARM_BATCHES - 1] > _GROWTH
                and len(memory) == 1
            ):
                tally.failures.append((numbers.start, f"memory grew to {seen[-1] >> 20} MiB"))
            connection.send(tally)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _keep(target: str, seed: int, number: int) -> None:
    folder = KEPT / f"{target}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lay_out(inputs_of(target, seed, number), folder)


def _show(tallies: dict[str, Tally], seconds: float) -> None:
    for name, tally in tallies.items():
        refused = tally.executions - tally.outcomes["read"] - len(tally.failures)
        rate = tally.executions / max(tally.seconds, 1e-9)
        print(
            f"{name:12} {tally.executions:9,} executions  {rate:8,.0f}/s  {tally.outcomes['read']:8,} read  "
            f"{refused:9,} refused in {len(tally.outcomes):4} ways  {len(tally.failures)} failures"
        )
        for number, what in tally.failures[:_FAILURES_KEPT]:
            print(f"  number {number}: {what}")
    executions = sum(tally.executions for tally in tallies.values())
    failures = sum(len(tally.failures) for tally in tallies.values())
    print(f"{executions:,} executions in {seconds:.0f} s, {failures} failures")


if __name__ == "__main__":
    sys.exit(main())
