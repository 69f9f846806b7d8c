"""Adding, removing and renaming tasks. Each is one step of the file that makes the task be there:
whatever is killed when, the task is as before or as wished, and no other is touched.

To rename a task is to rename this file. A linked task's data keep the name that they were written under: the
graph refers to them by it, and to give them another would take a second step, with a moment between in which
the graph has no data. Content keeps them apart, not the task's name in front (`linked.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from loracle.files import write_atomic
from loracle.files.atomic import flush_folder, reported
from loracle.files.lock import locked
from loracle.reference import FileError

from .deployed_tasks import base_graph, deployed_task
from .exporter import ExportSummary, export
from .external import load_graph
from .linked import remove_unmentioned
from .names import DATA_FILE, GRAPH_FILE
from .options import noted_options
from .swappable import drop_inputs
from .task_names import SUFFIXES, check_name, find_task, find_tasks, require_new
from .verification.report import VerifyReport
from .verified import forget, forget_all_but, record_file, verified_of, write_verified
from .write import Progress


@dataclass(frozen=True)
class _Form:
    """What changes of tasks in one form have to mind.

    Attributes:
        locked: the file whose lock they hold: one that no change exchanges.
        tidy: removes what no task needs any longer.
    """

    locked: str
    tidy: Callable[[Path], None]


_FORMS: Mapping[str, _Form] = {
    "linked": _Form(GRAPH_FILE, remove_unmentioned),
    "swappable": _Form(GRAPH_FILE, drop_inputs),
    "adapter-inputs": _Form(DATA_FILE, lambda _: None),
}


def add_task(
    deployment: Path,
    name: str,
    model_dir: str | Path,
    adapter_dir: str | Path,
    *,
    form: str = "linked",
    replace: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Add a task to a deployment that is there, in its base's dtype; see `export`.

    Raises:
        LoracleError: what is wrong with the input, in one line; the deployment's tasks are as before then.
    """
    base = base_graph(deployment)
    options = noted_options(load_graph(base), str(base))
    return export(
        model_dir,
        deployment,
        adapter_dir,
        dtype=options.dtype,
        form=form,
        name=name,
        replace=replace,
        quantization=options.quantization,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def remove_task(deployment: Path, name: str) -> None:
    """Remove a task from a deployment, and then what no other task needs.

    Raises:
        ConfigError: `name` cannot be a task's. FileError: there is no such task, or it cannot be removed.
    """
    with _found(deployment, name) as (form, path):
        path.unlink()
        flush_folder(deployment)
        forget_all_but(deployment, [held for held, _ in find_tasks(deployment)])
        with suppress(OSError, FileError):  # the task is gone; what is left over harms nobody
            _FORMS[form].tidy(deployment)


def rename_task(deployment: Path, name: str, new: str) -> None:
    """Rename a task of a deployment; a record of its verification goes with it.

    Raises:
        ConfigError: a name cannot be a task's.
        FileError: there is no such task, there is one of the new name, or it cannot be renamed.
    """
    check_name(new)
    with _found(deployment, name) as (form, path):
        require_new(deployment, new, form)
        record = record_file(deployment, name)
        if record.is_file():  # it speaks of bytes: under the new name it may be there before the task is
            write_atomic(record_file(deployment, new), record.read_bytes())
        os.rename(path, deployment / f"{new}{SUFFIXES[form]}")
        flush_folder(deployment)
        forget_all_but(deployment, [held for held, _ in find_tasks(deployment)])


def record_verification(deployment: Path, name: str, report: VerifyReport) -> bool:
    """Keep what `verify` has found of a task where all checks have passed; else remove an older record.

    Returns whether there is a record now.

    Raises:
        ConfigError: `name` cannot be a task's.
        FileError: there is no such task, or it has no document, or not the one that was verified, or the
            record cannot be written.
    """
    with _found(deployment, name) as (_, path):
        if not report.passed:
            forget(deployment, name)
            return False
        document = deployed_task(deployment, name).document
        if document is None or document.sha256 != report.sha256:
            held = "none" if document is None else "another"
            raise FileError(
                f"{path}: expected the document of what was verified, found {held}; "
                "add the task again, or verify it again"
            )
        write_verified(deployment, name, verified_of(report, document.sha256))
        return True


@contextmanager
def _found(deployment: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Form and file of a task, which no other process changes during the block."""
    form, path = find_task(deployment, name)
    with reported(path), locked(deployment / _FORMS[form].locked):
        yield find_task(deployment, name)  # it may have gone while the lock was waited for
