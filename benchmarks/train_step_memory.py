"""Peak memory of training steps, each way in a fresh process.

    python -m benchmarks.train_step_memory JSON     # what such a process runs

The figure is the largest resident set of the process. Beside it, the same less the peak of a process that
imports as much and builds the model alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from .process import measure
from .train_step_subjects import Case, Workload, base_model, subject

STEPS = 2
"""The optimizer's state is there from the first step's end, so the second is the largest."""

AT_ONCE = 2
"""Processes side by side, each with its part of the threads: half their time is imports."""


@dataclass(frozen=True)
class Job:
    """What a process does: `STEPS` steps of the way called ``name``; it only builds the model for None."""

    work: Workload
    name: str | None
    case: Case | None
    threads: int

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        model = base_model(self.work)
        if self.name is None:
            return
        tokens = self.work.tokens(model.config.vocab_size)
        own = subject(self.name, model, self.case)
        for _ in range(STEPS):
            own.step(tokens)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        case = None if fields["case"] is None else Case(**fields["case"])
        return Job(Workload(**fields["work"]), fields["name"], case, fields["threads"])

    def peak_bytes(self) -> int:
        """The largest resident set of a process that runs the job, in bytes."""
        return measure([sys.executable, "-m", "benchmarks.train_step_memory", self.to_json()]).peak_bytes


def peaks(
    work: Workload, wanted: Sequence[tuple[str, Case | None]], threads: int
) -> tuple[int, dict[tuple[str, Case | None], int]]:
    """(peak of building the model, peak of each way), in bytes; the processes share the threads."""
    jobs = [Job(work, name, case, max(1, threads // AT_ONCE)) for name, case in [(None, None), *wanted]]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        built, *largest = pool.map(Job.peak_bytes, jobs)
    return built, dict(zip(wanted, largest, strict=True))


if __name__ == "__main__":
    Job.from_json(sys.argv[1]).run()
