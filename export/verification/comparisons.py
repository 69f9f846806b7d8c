"""Comparing the weights of a large candidate in processes of their own, ahead of where they are asked for.

One process uses little more than one processor: threads of Python wait for one another between any two array
operations. The processes map the same files, so no weight is copied from one to another.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO

from loracle.files import Adapter, Checkpoint, MergedWeights
from loracle.files.lora_pair import FLOATS
from loracle.files.mapped_view import MappedView
from loracle.reference import CheckError, LoracleError
from loracle.reference.merge_inputs import check_threads

from .comparison import Comparison, compare
from .one_weight import weight_of

LARGE_BYTES = 1 << 30
"""From so many bytes of held weights on processes are started: one takes about half a second."""

_OWN_BYTES = 1 << 20
"""A smaller weight is compared where it is asked for."""


@dataclass(frozen=True)
class Held:
    """What a candidate holds as the weight `name` of the base's checkpoint, in that one's orientation."""

    name: str
    view: MappedView


@dataclass(frozen=True, eq=False)
class Setup:
    """What a process compares with."""

    model_dir: Path
    adapter: Adapter | None


def comparable(weights: MergedWeights, held: Iterable[tuple[str, MappedView | None]]) -> list[Held]:
    """Those that are mapped, have the shape of the weight they are said to be, and are floating-point."""
    return [
        Held(name, view)
        for name, view in held
        if view is not None
        and view.shape == weights.shape(name)
        and view.dtype in FLOATS
        and weights.dtype(name) in FLOATS
    ]


class Comparisons:
    """Compares weights in processes that take them one by one, in their order; a context manager.

    Args:
        weights: the base, a folder, with the adapter merged in.
        held: what is to be compared.
        processes: how many; one per CPU by default.
        large: with fewer bytes of weights none is started; `LARGE_BYTES` by default.
    """

    def __init__(
        self,
        weights: MergedWeights,
        held: Sequence[Held],
        *,
        processes: int | None = None,
        large: int | None = None,
    ) -> None:
        own = [one for one in dict.fromkeys(held) if one.view.nbytes >= _OWN_BYTES]
        checkpoint = weights.checkpoint
        self._setup: Setup | None = None
        least = LARGE_BYTES if large is None else large
        if isinstance(checkpoint, Checkpoint) and sum(one.view.nbytes for one in own) >= least:
            self._setup = Setup(checkpoint.dir, weights.adapter)
        self._held = own if self._setup is not None else []
        self._asked = frozenset(self._held)
        self._processes = min(check_threads(processes), len(self._held))
        self._running: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._work: SimpleQueue[Held | None] = SimpleQueue()
        self._done = threading.Condition()
        self._found: dict[Held, Comparison | LoracleError] = {}
        self._feeding = self._processes

    def __enter__(self) -> Comparisons:
        for one in self._held:
            self._work.put(one)
        for _ in range(self._processes):
            self._work.put(None)
            process = _started()
            self._running.append(process)
            self._threads.append(threading.Thread(target=self._serve_process, args=(process,), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._running:
            process.communicate()

    def of(self, held: Held) -> Comparison | None:
        """The comparison of a weight, as soon as it is made; None where it is not made ahead.

        Raises:
            LoracleError: as `compare`. CheckError: the process that made it has ended too soon, or gave what
                cannot be read.
        """
        if held not in self._asked:
            return None
        with self._done:
            self._done.wait_for(lambda: held in self._found or not self._feeding)
            found = self._found.get(held)
        if found is None:
            raise CheckError(f"{held.name}: no process has compared it; see the error above")
        if isinstance(found, LoracleError):
            raise found
        return found

    def _serve_process(self, process: subprocess.Popen[bytes]) -> None:
        """Feed it; whatever ends this thread, nobody waits for what it has not done."""
        try:
            self._feed(process)
        finally:
            with self._done:
                self._feeding -= 1
                self._done.notify_all()

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """Give a process one weight after another, and take what it finds."""
        assert process.stdin is not None
        assert process.stdout is not None
        ended = _sent(process, process.stdin, self._setup)
        for held in iter(self._work.get, None):
            found: Comparison | LoracleError
            ended = ended or _sent(process, process.stdin, held)
            if ended is not None:
                found = ended
            else:
                try:
                    found = pickle.load(process.stdout)  # noqa: S301  (its own process)
                except (EOFError, pickle.UnpicklingError):
                    found = ended = _ended(process)
            with self._done:
                self._found[held] = found
                self._done.notify_all()


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Compare what comes in until it ends: a `Setup`, then each `Held`, pickled by the process that started
    this one; each is answered with a `Comparison`, or the error."""
    setup = pickle.load(source)  # noqa: S301  (from the process that started it)
    with Checkpoint(setup.model_dir) as checkpoint:
        weights = MergedWeights(checkpoint, setup.adapter, threads=1)
        while True:
            try:
                held = pickle.load(source)  # noqa: S301
            except EOFError:
                return
            answer: Comparison | LoracleError
            try:
                array = held.view.open(soon=True)
                if held.name in checkpoint:
                    checkpoint.expect(held.name)
                answer = compare(weight_of(weights, held.name), array)
            except LoracleError as error:
                answer = error
            weights.release(held.name)
            pickle.dump(answer, sink)
            sink.flush()


def _started() -> subprocess.Popen[bytes]:
    """Start a process that serves; not in this one's group, so that an interrupt ends this one alone."""
    return subprocess.Popen(
        [sys.executable, "-m", "loracle.export.verification.compare_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0 if os.name == "posix" else -1,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _sent(process: subprocess.Popen[bytes], sink: IO[bytes], value: object) -> CheckError | None:
    """Send a value; return the error where the process has ended."""
    try:
        pickle.dump(value, sink)
        sink.flush()
    except BrokenPipeError:
        return _ended(process)
    return None


def _ended(process: subprocess.Popen[bytes]) -> CheckError:
    return CheckError(
        f"a process that compares weights has ended with code {process.wait()}; is there too little memory?"
    )
