"""A way of having many tasks in a process of its own: a request a line, an answer a line.

    python -m benchmarks.tasks_process OPENING

OPENING is the JSON of a `tasks_ways.Opening`. The process imports what its way imports, and answers
`{"memory": []}` (bytes), `{"open": []}`, `{"load": [task]}` (seconds), `{"answer": [task, prompt, tokens]}`
and `{"switch": [tasks, prompt, samples]}` (seconds of each). It ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import import_module
from typing import Any

from .answer import Answer
from .process import resident_bytes
from .tasks_ways import PACKAGES, Opening, Way, open_way

SWITCH_TOKENS = 2


class TaskProcess:
    """The process, from outside."""

    def __init__(self, opening: Opening) -> None:
        self._way = opening.way
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tasks_process", json.dumps(asdict(opening))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def memory(self) -> tuple[int, int]:
        """Proportional and resident set, in bytes; see `process.resident_bytes`."""
        proportional, resident = self._ask("memory")
        return proportional, resident

    def open(self) -> float:
        """Open what there is before any task; return the seconds."""
        return float(self._ask("open"))

    def load(self, task: str) -> float:
        """Bring a task into memory; return the seconds."""
        return float(self._ask("load", task))

    def answer(self, task: str, prompt: Sequence[int], new_tokens: int) -> Answer:
        """A task's answer; getting ready for it is part of the seconds to its first token."""
        found = self._ask("answer", task, list(prompt), new_tokens)
        return Answer(tuple(found["tokens"]), found["first"], found["rest"])

    def switch(self, tasks: Sequence[str], prompt: Sequence[int], samples: int) -> list[float]:
        """Seconds from the end of a task's answer until the next of `tasks` is ready to answer."""
        return [float(seconds) for seconds in self._ask("switch", list(tasks), list(prompt), samples)]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _ask(self, request: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and below says why
            print(json.dumps({request: arguments}), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            code = self._process.wait()
            self._said.seek(0)
            lines = self._said.read().splitlines()[-8:]
            raise SystemExit("\n".join([f"{self._way}, {request}: exit code {code}", *lines]))
        return json.loads(line)


@contextmanager
def task_process(opening: Opening) -> Iterator[TaskProcess]:
    """A `TaskProcess`, which is ended."""
    process = TaskProcess(opening)
    try:
        yield process
    finally:
        process.close()


def answer_once(way: Way, task: str, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Get ready and answer, all of it timed."""
    gc.collect()
    start = time.perf_counter()
    run = way.ready(task, len(prompt) + new_tokens)
    ready = time.perf_counter() - start
    found = run(prompt, new_tokens)
    return replace(found, first=ready + found.first)


def switch_seconds(way: Way, tasks: Sequence[str], prompt: Sequence[int], samples: int) -> list[float]:
    """Answer with one task after the other; seconds until the next is ready.

    What was made ready for a task is kept until the next one is: letting go of it is no part of a switch.
    """
    capacity, seconds = len(prompt) + SWITCH_TOKENS, []
    run = way.ready(tasks[0], capacity)
    for sample in range(1, samples + 1):
        run(prompt, SWITCH_TOKENS)
        start = time.perf_counter()
        following = way.ready(tasks[sample % len(tasks)], capacity)
        seconds.append(time.perf_counter() - start)
        run = following
    return seconds


def _respond(request: str, arguments: Sequence[Any], opening: Opening, held: dict[str, Way]) -> Any:
    """Do what is asked; `held` gets the way when it is opened."""
    if request == "memory":
        gc.collect()
        return resident_bytes()
    if request == "answer":
        return asdict(answer_once(held["way"], *arguments))
    if request == "switch":
        return switch_seconds(held["way"], *arguments)
    start = time.perf_counter()
    if request == "open":
        held["way"] = open_way(opening)
    else:
        held["way"].load(*arguments)
    return time.perf_counter() - start


def main(argv: Sequence[str]) -> None:
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    opening = Opening(**json.loads(argv[0]))
    for package in PACKAGES[opening.way]:
        import_module(package)
    gc.collect()
    gc.freeze()
    gc.disable()
    held: dict[str, Way] = {}
    for line in sys.stdin:
        asked: Mapping[str, Any] = json.loads(line)
        ((request, arguments),) = asked.items()
        print(json.dumps(_respond(request, arguments, opening, held)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
