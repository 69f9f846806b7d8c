"""`python -m loracle.demo --out DIR`: two tasks on one real model, from text to one verified folder.

Exit code 0 where both tasks improve with p < 0.05 and both verify, else 1; 2 for wrong input.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import typer
from rich.console import Console

from loracle.cli.guard import one_line_errors
from loracle.cli.progress import bar, stderr
from loracle.files import write_atomic
from loracle.files.machine import describe_machine
from loracle.reference import CheckError, FileError

from .console import deployment_table, task_table
from .pipeline import run_task
from .report import DemoReport, TaskReport, render
from .settings import TASKS
from .smollm2 import model_folder
from .tasks import build_tasks

SIGNIFICANT = 0.05
_MARK = ".loracle-demo"
_PACKAGES = ("torch", "transformers", "onnxruntime", "onnx-ir", "onnxscript", "numpy")


@contextmanager
def _stage(title: str) -> Iterator[Callable[[int, int], None]]:
    start = time.perf_counter()
    with bar(title) as advance:
        yield advance
    stderr.print(f"[dim]{time.perf_counter() - start:6.1f} s[/dim]  {title}")


def _fresh(out: Path) -> None:
    """Make `out` an empty folder; one that an earlier demo made is replaced, anything else is left alone."""
    if (out / _MARK).is_file():
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out}: exists and is not an earlier demo's; choose another --out or remove it")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def succeeded(task: TaskReport) -> bool:
    """Whether the task got better on held-out text beyond chance, and every check passed."""
    better = task.quality.after > task.quality.before and task.quality.p_value < SIGNIFICANT
    return better and task.verified


def run(out: Path) -> bool:
    """Run the demo into `out`; whether all of it succeeded."""
    start = time.perf_counter()
    _fresh(out)
    with _stage("the base model, SmolLM2-135M-Instruct"):
        model = model_folder()
    with _stage("the tasks' text"):
        files = build_tasks(out / "data")
    tasks = tuple(run_task(task, files[task.name], model, out, _stage) for task in TASKS)
    report = DemoReport(
        model=model.name,
        seconds=time.perf_counter() - start,
        tasks=tasks,
        machine=describe_machine(),
        versions=(("python", platform.python_version()), *((name, version(name)) for name in _PACKAGES)),
    )
    write_atomic(out / "report.html", render(report).encode())
    console = Console()
    for task in tasks:
        console.print(task_table(task))
    console.print(deployment_table(report))
    console.print(f"{report.seconds / 60:.1f} minutes; the page: {out / 'report.html'}")
    return all(succeeded(task) for task in tasks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loracle.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for all that is made")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    try:
        with one_line_errors(arguments.debug):
            done = run(arguments.out)
    except typer.Exit as ended:
        raise SystemExit(ended.exit_code) from ended
    raise SystemExit(0 if done else CheckError.exit_code)


if __name__ == "__main__":
    main()
