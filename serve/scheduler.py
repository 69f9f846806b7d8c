"""One thread that computes all answers: a batch of one task at a time, the oldest request's first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Condition, Thread

from loracle.export.deployment import Deployment
from loracle.export.generation import generate
from loracle.export.opening import REFUSALS
from loracle.reference import LoracleError

from .batches import BatchLimits, capacity, choose
from .errors import RequestError, internal_error, shutting_down
from .rows import Row
from .tasks import unknown_task

LOG = logging.getLogger("loracle.serve")

# What a batch may end with beside our own errors: onnxruntime's, and the lack of memory.
_FAILURES: tuple[type[Exception], ...] = (LoracleError, OSError, RuntimeError, MemoryError, *REFUSALS)


class Scheduler:
    """Takes prompts, and answers them batch by batch.

    Args:
        deployment: whose tasks answer.
        limits: of a batch.
        max_waiting: most prompts that wait.
        on_batch: called in the thread with the number of rows of each batch.
    """

    def __init__(
        self,
        deployment: Deployment,
        limits: BatchLimits,
        max_waiting: int,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._deployment = deployment
        self._limits = limits
        self._max_waiting = max_waiting
        self._on_batch = on_batch
        self._changed = Condition()
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._stopped = False
        # A daemon: one that is in the middle of a batch must not keep a process that is told twice to end.
        self._thread = Thread(target=self._work, name="loracle-serve", daemon=True)

    @property
    def waiting(self) -> int:
        """How many prompts wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many prompts are being answered."""
        return sum(not row.ended for row in self._running)

    @property
    def alive(self) -> bool:
        """Whether prompts are answered."""
        return self._thread.is_alive() and not self._stopped

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Let prompts wait for their answers.

        Raises RequestError: 429 where as many wait already, 503 where nothing is answered any more.
        """
        with self._changed:
            if self._stopped:
                raise shutting_down()
            if len(self._waiting) + len(rows) > self._max_waiting:
                raise RequestError(
                    429,
                    f"{len(self._waiting)} prompts wait already, and at most {self._max_waiting} may; "
                    "ask again later",
                    code="too_many_waiting",
                    headers={"Retry-After": "1"},
                )
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these answers any more: none of them is begun, and a running one ends."""
        for row in rows:
            row.cancelled = True
        with self._changed:
            self._waiting = [row for row in self._waiting if not row.cancelled]

    def stop(self) -> None:
        """End: what waits or runs gets 503. The thread ends with the step that it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait until the thread has ended; see `stop`."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _work(self) -> None:
        try:
            while rows := self._next():
                self._on_batch(len(rows))
                self._answer(rows)
                self._running = []
        finally:
            # Whatever ends the thread, nobody is left waiting.
            with self._changed:
                self._stopped = True
                left, self._waiting = self._waiting, []
            for row in (*self._running, *left):
                row.fail(shutting_down())

    def _next(self) -> list[Row]:
        """Wait for prompts, and take some; none where the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if self._stopped:
                return []
            self._running = choose(self._waiting, self._limits)
            taken = set(map(id, self._running))
            self._waiting = [row for row in self._waiting if id(row) not in taken]
            return self._running

    def _answer(self, rows: Sequence[Row]) -> None:
        """Answer a batch. Rows that do not come to their end get an error."""
        try:
            self._generate(rows)
        except _FAILURES as error:
            self._fail(rows, error)

    def _generate(self, rows: Sequence[Row]) -> None:
        session = self._deployment.decoder(rows[0].task, capacity(rows, self._limits), len(rows))

        def finished(place: int) -> bool:
            row = rows[place]
            return row.ended or row.cancelled or self._stopped

        steps = generate(
            session,
            [row.prompt for row in rows],
            max(row.max_tokens for row in rows),
            sampling=[row.sampling for row in rows],
            finished=finished,
        )
        for place, token in steps:
            if not self._stopped:
                rows[place].push(token)
        if self._stopped:
            for row in rows:
                row.fail(shutting_down())

    def _fail(self, rows: Sequence[Row], error: BaseException) -> None:
        task = rows[0].task
        tasks = self._deployment.tasks
        if task is not None and task not in tasks:
            answer = unknown_task(task, tasks)
        else:
            LOG.error("a batch of %s failed: %s: %s", task or "the base", type(error).__name__, error)
            answer = internal_error()
        for row in rows:
            row.fail(answer)
