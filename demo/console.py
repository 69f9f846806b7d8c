"""The demo's result in the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from . import figures
from .report import DemoReport, TaskReport


def task_table(report: TaskReport) -> Table:
    """Return one table: quality, size, proof and speed of a task, base beside tuned.

    Every string is plain text to rich: brackets in a name or a figure are not markup.
    """
    table = Table(
        title=Text(f"{report.task.name}: {report.task.title}"),
        title_justify="left",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    table.add_column("")
    for row in _rows(report):
        table.add_row(*(Text(cell) for cell in row))
    table.add_section()
    for check in report.checks:
        verdict = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        table.add_row(Text(check.name), Text(""), verdict, Text("; ".join([check.figure, *check.failures])))
    return table


def deployment_table(report: DemoReport) -> Table:
    """Return one table: what the base and each task cost in the one folder that holds them all."""
    table = Table(
        title=Text("the deployment: one base, merged tensors beside it"),
        title_justify="left",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("", "on disk", "of the base", "a switch to it"):
        table.add_column(heading, justify="left" if not heading else "right")
    base = report.tasks[0].model_bytes
    table.add_row(Text("base model"), Text(figures.size(base)), Text(""), Text(""))
    for task in report.tasks:
        table.add_row(
            Text(task.task.name),
            Text(f"+ {figures.size(task.task_bytes)}"),
            Text(figures.share(task.task_bytes, base)),
            Text(figures.milliseconds(task.switch_seconds)),
        )
    return table


def _rows(report: TaskReport) -> list[tuple[str, str, str, str]]:
    quality = report.quality
    rows = [
        (
            f"{report.task.metric} on {report.heldout_rows} held-out texts",
            figures.score(quality.before),
            figures.score(quality.after),
            f"{figures.change(quality.before, quality.after)} "
            f"{figures.interval(quality.low, quality.high, 1)}, {figures.p_value(quality.p_value)}",
        ),
        (
            "parameters, trained",
            figures.count(report.total_parameters - report.trainable_parameters),
            figures.count(report.trainable_parameters),
            f"{figures.share(report.trainable_parameters, report.total_parameters)}, "
            f"{figures.duration(report.training_seconds)}",
        ),
        (
            "bytes, adapter",
            figures.size(report.model_bytes),
            figures.size(report.adapter_bytes),
            figures.share(report.adapter_bytes, report.model_bytes),
        ),
    ]
    base, *others = report.speeds.items()
    rows += [
        (
            f"tokens a second, {name}",
            f"{base[1].tokens_per_second:.1f}",
            f"{speed.tokens_per_second:.1f}",
            f"ratio {speed.ratio:.3f} {figures.interval(speed.low, speed.high, 3)}",
        )
        for name, speed in others
    ]
    return rows
