"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

stderr = Console(stderr=True)


@contextmanager
def bar(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar that the yielded function moves: `advance(done, total)`. Nothing is drawn where `quiet`, or
    where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=quiet or not stderr.is_terminal) as drawn:
        task = drawn.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            drawn.update(task, completed=done, total=total)

        yield advance


@contextmanager
def training_bar() -> Iterator[Callable[[int, int, float | None], None]]:
    """As `bar`, with the loss beside the time left: `advance(step, steps, loss)`."""
    columns = (
        TextColumn("fine-tuning"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("step {task.completed}/{task.total}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as drawn:
        task = drawn.add_task("", total=None)

        def advance(step: int, steps: int, loss: float | None) -> None:
            drawn.update(task, completed=step, total=steps)
            if loss is not None:
                drawn.update(task, description=f"loss {loss:.3f}")

        yield advance
